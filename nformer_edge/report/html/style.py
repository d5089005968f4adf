"""The report's style sheet: light and dark, phone and desk, no font or file from elsewhere."""

from __future__ import annotations

CSS = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#15191f;--soft:#5b6573;--line:#e2e6eb;--accent:#2457d6;
--good:#107a4b;--good-bg:#e2f5ea;--bad:#bf2330;--bad-bg:#fde8e9;--open:#8a5a00;--open-bg:#fdf1d8;--quiet-bg:#eceff3;
--c0:#2457d6;--c1:#dd6b12;--c2:#11885a;--c3:#8b46c9;--c4:#c2306f;--c5:#0e8aa3;--c6:#857a12;--c7:#69707c}
@media(prefers-color-scheme:dark){:root{--bg:#0f1217;--card:#181c23;--ink:#e8ebf0;--soft:#9aa5b4;--line:#2a303a;
--accent:#86abff;--good:#57d696;--good-bg:#12351f;--bad:#ff8b92;--bad-bg:#431a1e;--open:#f1c060;--open-bg:#3b2c0c;
--quiet-bg:#262c36;--c0:#7fa6ff;--c1:#ffa25c;--c2:#4fcf98;--c3:#c796f5;--c4:#f385b4;--c5:#59c9e0;--c6:#d3c654;
--c7:#a3abb8}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:40px 20px 64px}
header{margin-bottom:28px}
h1{font-size:1.75rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 6px}
h2{font-size:1.15rem;letter-spacing:-.01em;margin:0 0 4px}
h3{font-size:.95rem;margin:22px 0 8px}
p{margin:0 0 12px}
.soft,.note{color:var(--soft)}
.note{font-size:.86rem}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px;margin:0 0 20px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0 0;padding:0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px;min-width:0}
.facts dt{font-size:.78rem;color:var(--soft)}
.facts dd{margin:2px 0 0;font-size:1.15rem;font-weight:640;letter-spacing:-.01em;font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:12px -24px 0;padding:0 24px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:8px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:.8rem}
th:first-child,td:first-child{padding-left:0}
th:last-child,td:last-child{padding-right:0}
.l{text-align:left}
tbody tr:last-child td,tbody tr:last-child th{border-bottom:0}
tbody th{font-weight:500;color:var(--ink);font-size:.9rem}
tbody tr.group th{padding-top:18px;font-weight:650}
tbody th{white-space:normal;min-width:128px}
.tight th,.tight td{padding-left:5px;padding-right:5px}
td small{color:var(--soft);font-size:.75rem}
.glance{font-weight:600}
.glance.passed{color:var(--good)}
.glance.failed,.glance.alarm{color:var(--bad)}
.glance.undecided{color:var(--open)}
.glance.quiet,.glance.reported{color:var(--soft);font-weight:400}
.glance.failed::before,.glance.alarm::before{content:"\\2717\\00a0"}
.glance.passed::before{content:"\\2713\\00a0"}
.glance.undecided::before{content:"?\\00a0"}
details{border-top:1px solid var(--line);margin-top:14px;padding-top:12px}
summary{cursor:pointer;font-weight:600;font-size:.92rem}
.best{font-weight:680}
.pill{display:inline-block;padding:1px 10px;border-radius:99px;font-size:.78rem;font-weight:620;white-space:nowrap}
.pill.passed{background:var(--good-bg);color:var(--good)}
.pill.failed,.pill.alarm{background:var(--bad-bg);color:var(--bad)}
.pill.undecided{background:var(--open-bg);color:var(--open)}
.pill.quiet,.pill.reported,.pill.short{background:var(--quiet-bg);color:var(--soft)}
svg{display:block;width:100%;height:auto;max-width:860px}
.grid{stroke:var(--line);stroke-width:1}
.tick,.axis,.mark{fill:var(--soft);font-size:13px}
.curve{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.mark{fill:var(--ink);stroke:var(--card);stroke-width:4px;stroke-linejoin:round;paint-order:stroke}
.dot{stroke:var(--card);stroke-width:1.5}
.dot.hollow{stroke:var(--c7);stroke-width:2.2}
.dashed.curve{stroke-dasharray:6 5}
.curve.c0{stroke:var(--c0)}.curve.c1{stroke:var(--c1)}.curve.c2{stroke:var(--c2)}.curve.c3{stroke:var(--c3)}
.curve.c4{stroke:var(--c4)}.curve.c5{stroke:var(--c5)}.curve.c6{stroke:var(--c6)}.curve.c7{stroke:var(--c7)}
.c0:is(rect,circle){fill:var(--c0)}.c1:is(rect,circle){fill:var(--c1)}.c2:is(rect,circle){fill:var(--c2)}
.c3:is(rect,circle){fill:var(--c3)}.c4:is(rect,circle){fill:var(--c4)}.c5:is(rect,circle){fill:var(--c5)}
.c6:is(rect,circle){fill:var(--c6)}.c7:is(rect,circle){fill:var(--c7)}
circle.hollow{fill:var(--card)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;margin:10px 0 0;padding:0;font-size:.84rem;
color:var(--soft)}
.legend li{display:flex;align-items:center;gap:7px}
.key{display:inline-block;width:18px;height:0;border-top:4px solid currentColor;border-radius:2px}
.key.dashed{border-top-style:dashed;border-top-width:2px;border-radius:0}
.key.c0{color:var(--c0)}.key.c1{color:var(--c1)}.key.c2{color:var(--c2)}.key.c3{color:var(--c3)}
.key.c4{color:var(--c4)}.key.c5{color:var(--c5)}.key.c6{color:var(--c6)}.key.c7{color:var(--c7)}
.bars{display:grid;gap:8px;margin-top:14px}
.bar{display:grid;grid-template-columns:minmax(130px,230px) 1fr 84px;gap:12px;align-items:center;font-size:.88rem}
.bar-label{overflow-wrap:anywhere;min-width:0}
.bar svg{height:20px;max-width:none}
.bar-total{text-align:right;font-variant-numeric:tabular-nums}
.lists{overflow-x:auto;margin:8px -24px 0;padding:0 24px 6px}
.list{display:grid;grid-template-columns:86px repeat(var(--n),58px);gap:8px;align-items:start;width:max-content}
.list+.list{margin-top:8px}
.list .who{font-size:.78rem;color:var(--soft);padding-top:4px;line-height:1.3;position:sticky;left:-24px;
background:var(--card);z-index:1;padding-left:4px}
figure{margin:0;text-align:center}
figure img,figure .missing{display:block;width:58px;height:116px;object-fit:cover;border-radius:6px;
border:3px solid var(--accent);background:var(--quiet-bg)}
figure .missing{font-size:.66rem;color:var(--soft);padding:38px 2px 0;line-height:1.2}
.right img,.right .missing{border-color:#1c9c62}
.wrong img,.wrong .missing{border-color:#d93542}
figcaption{font-size:.72rem;color:var(--soft);line-height:1.3;margin-top:2px}
.right figcaption{color:var(--good)}
.wrong figcaption{color:var(--bad)}
.queries{display:grid;gap:20px}
.details{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:3px 18px;margin:12px 0 0;font-size:.88rem}
.details dt{color:var(--soft)}
.details dd{margin:0;overflow-wrap:anywhere}
.blame{border-left:4px solid var(--bad);padding:2px 0 2px 14px;margin:18px 0 0;font-size:.9rem}
.blame p{margin:0}.blame ul{margin:4px 0 0;padding-left:18px;color:var(--soft)}
footer{color:var(--soft);font-size:.82rem;text-align:center}
@media(max-width:640px){main{padding:24px 12px 40px}section{padding:18px 16px}.scroll,.lists{margin-left:-16px;
margin-right:-16px;padding-left:16px;padding-right:16px}.list .who{left:-16px}h1{font-size:1.4rem}
.bar{grid-template-columns:1fr 76px;gap:2px 10px}.bar-label{grid-column:1/-1}th,td{padding:7px 8px}}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
