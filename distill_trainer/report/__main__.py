"""`python -m distill_trainer.report`."""

from distill_trainer.report.compare import main

if __name__ == "__main__":
    main()
