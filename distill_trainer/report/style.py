"""The style sheets of the HTML report and of its plots, and the colours of the experts."""

# Apart from the models' colours and from each other, also without red or green; mixed with the page behind text.
EXPERT_COLORS = ("#3fb0a0", "#d4687c", "#d9c25a", "#7d72d8", "#74bfe6", "#9a9a3c", "#b356a3", "#c98b57")
_EXPERTS = "".join(
    f".e{slot}{{background:color-mix(in srgb,{color} 42%,var(--card))}}" for slot, color in enumerate(EXPERT_COLORS)
)

# Tones for light and for dark pages.
THEMES = """
:root{--page:#f6f7f9;--card:#fff;--text:#1c2530;--muted:#5b6776;--line:#e4e8ed;--student:#2563eb;--baseline:#c86a04;
--teacher:#0b8a66;--aware:#7c3aed;--before:#64748b;--accent:#d02670;--tint:#eef3fe}
@media(prefers-color-scheme:dark){:root{--page:#0e1217;--card:#161b22;--text:#e6eaf0;--muted:#9aa7b5;--line:#2a323c;
--student:#6aa5ff;--baseline:#f0ad45;--teacher:#3ccf9f;--aware:#ab8dff;--before:#94a3b8;--accent:#f47bb5;
--tint:#182436}}
"""
CHARTS = """
.chart{display:block;width:100%;height:auto;font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums}
.chart text{fill:var(--muted)}
.chart .axis{fill:var(--text)}
.chart .grid{fill:none;stroke:var(--line)}
.chart .mark{fill:none;stroke:var(--muted);stroke-dasharray:1 4}
.chart .line{fill:none;stroke-width:1.8;stroke-linecap:round;stroke-linejoin:round}
"""
SVG = '<svg xmlns="http://www.w3.org/2000/svg"'
STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:clamp(24px,4vw,34px);line-height:1.2;margin:0;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:20px;margin:40px 0 14px}
h3,figcaption{font-size:15px;font-weight:600;margin:0 0 10px}
p{margin:12px 0;max-width:74ch}
.eyebrow{margin:0 0 4px;color:var(--muted);font-size:13px;letter-spacing:.08em;text-transform:uppercase}
.from{margin:6px 0 0;color:var(--muted);overflow-wrap:anywhere}
.from b{color:var(--text);font-weight:600}
.verdict{max-width:none;margin:24px 0;padding:16px 20px;background:var(--card);border-left:5px solid var(--before);
border-radius:8px;font-size:18px;line-height:1.45}
.verdict.paid{border-color:var(--teacher)}
.verdict.lost,.verdict.worse{border-color:var(--baseline)}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:10px 12px;text-align:right;border-bottom:1px solid var(--line);font-weight:400}
th:first-child{text-align:left}
thead th{color:var(--muted);font-size:13px}
tbody tr:last-child>*{border-bottom:0}
.headline{background:var(--card);border-radius:8px;overflow:hidden}
.headline tbody th,.headline td:last-child{white-space:nowrap}
.headline .student>*{background:var(--tint);font-weight:600}
.headline tbody th{position:relative;padding-left:32px}
.dot{position:absolute;left:12px;top:50%;width:10px;height:10px;margin-top:-5px;border-radius:50%;
background:var(--before)}
.dot.student{background:var(--student)}
.dot.baseline{background:var(--baseline)}
.dot.teacher{background:var(--teacher)}
.dot.student_aware_teacher{background:var(--aware)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:16px;list-style:none;padding:0;
margin:24px 0}
.tiles li,.card,figure,.scroll{background:var(--card);border-radius:8px;padding:16px 20px}
.tiles li{color:var(--muted);font-size:14px}
.tiles b{display:block;color:var(--text);font-size:28px;line-height:1.3;letter-spacing:-.02em}
.grid{columns:440px 2;column-gap:16px}
.grid>*{break-inside:avoid;margin:0 0 16px}
.grid+.card{margin-top:16px}
dl{margin:0}
dl div{display:flex;justify-content:space-between;gap:16px;padding:7px 0;border-bottom:1px solid var(--line);
font-size:15px}
dl div:last-child{border-bottom:0}
dt{color:var(--muted);flex:none;max-width:62%}
dd{margin:0;text-align:right;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.bars th,.bars td{padding:6px 4px;font-size:14px;border:0}
.bars td{white-space:nowrap}
.bars .router,.bars .gate{font-weight:600;color:var(--student)}
.bars .gate{color:var(--teacher)}
.bars td:nth-child(2){width:62%;padding:6px 10px}
.bar{display:block;height:8px;min-width:2px;border-radius:0 4px 4px 0;background:var(--student)}
.bar.teacher{background:var(--teacher);margin-top:2px;height:5px}
.scroll{overflow-x:auto;padding:4px 8px}
.scroll.bare{padding:0}
.models td:nth-child(2){text-align:left;overflow-wrap:anywhere;min-width:12ch}
.models th:nth-child(2){text-align:left}
.small{padding:0}
.small th,.small td{padding:4px 6px;font-size:13px;white-space:nowrap}
.note{color:var(--muted);font-size:14px;line-height:1.45}
summary{cursor:pointer;color:var(--muted);font-size:14px}
h4{font-size:14px;font-weight:600;margin:0}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;list-style:none;margin:8px 0 12px;padding:0;font-size:13px;
color:var(--muted)}
.legend i{display:inline-block;min-width:20px;padding:0 4px;border-radius:3px;text-align:center;font-style:normal;
color:var(--text)}
.classes dt{max-width:none;color:var(--text);font-size:14px}
.classes dt span{color:var(--muted);font-size:13px}
.classes dd{margin:2px 0 10px}
.stack{display:flex;height:18px;margin-bottom:2px;border-radius:3px;overflow:hidden}
.stack.gate{height:14px;opacity:.8}
.stack i{font:12px/18px system-ui,sans-serif;text-align:center;overflow:hidden}
.stack.gate i{font-size:11px;line-height:14px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:0 32px}
.pair p{margin:0 0 18px;line-height:1.75;overflow-wrap:anywhere}
.pair span{padding:1px 1px 2px;border-radius:3px;border-bottom:2px solid transparent}
.pair sub{font-size:10px;line-height:1}
.pair .other,.legend .other{border-bottom:2px solid var(--text);border-radius:3px 3px 0 0}
.ex{background:color-mix(in srgb,var(--muted) 22%,var(--card))}
.g1{background:color-mix(in srgb,var(--aware) 12%,var(--card))}
.g2{background:color-mix(in srgb,var(--aware) 24%,var(--card))}
.g3{background:color-mix(in srgb,var(--aware) 38%,var(--card))}
.g4{background:color-mix(in srgb,var(--aware) 54%,var(--card))}
.grid>div>.card{margin-bottom:16px}
.quote{margin:0 0 12px;line-height:1.6;white-space:pre-wrap;overflow-wrap:anywhere}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,88px),1fr));gap:4px 16px;
border-top:1px solid var(--line);padding-top:10px}
.row div{display:block;border:0;padding:0}
.row dt,.written h4{position:relative;padding-left:15px;max-width:none;color:var(--muted);font-size:13px;
font-weight:400}
.row dd{text-align:left;padding-left:15px;font-size:15px}
.row .dot,.written .dot{left:0;width:8px;height:8px;margin-top:-4px}
main>section+section.card{margin-top:16px}
.written{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,280px),1fr));gap:14px 28px;
border-top:1px solid var(--line);padding-top:12px}
.written p{margin:4px 0 0;padding-left:15px;font-size:15px;line-height:1.5;white-space:pre-wrap;overflow-wrap:anywhere}
pre{background:var(--card);border-radius:8px;padding:16px 20px;margin:0;white-space:pre-wrap;overflow-wrap:anywhere;
font:14px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media(max-width:640px){.row{grid-template-columns:1fr 1fr}
main{padding:24px 14px 48px}.wide{display:none}th,td{padding:9px 6px;font-size:14px}
.headline tbody th{white-space:normal;line-height:1.3}.headline td{line-height:1.3}
.headline tbody th{padding-left:20px}.dot{left:6px;width:8px;height:8px;margin-top:-4px}.verdict{font-size:16px}
.verdict,.tiles li,.card,figure,pre{padding:14px}.tiles{grid-template-columns:1fr 1fr;gap:10px}
.tiles b{font-size:24px}.small th,.small td{padding:4px 3px;font-size:12px}}
"""
STYLE = THEMES + STYLE + CHARTS + _EXPERTS


def standalone(svg: str) -> str:
    """A plot of the page as the content of a file of its own, light or dark like the page that shows it."""
    style = f"<style>{THEMES}{CHARTS}.chart{{background:var(--card)}}</style>"
    start, end = svg.split(">", 1)
    return f"{start.replace('<svg', SVG, 1)}>{style}{end}\n"
