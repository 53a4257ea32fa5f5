"""`python -m distill_trainer.hub`."""

from distill_trainer.hub.push import main

if __name__ == "__main__":
    main()
