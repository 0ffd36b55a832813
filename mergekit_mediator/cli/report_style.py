"""The style sheet of the report: light and dark, wide and narrow, on screen and on paper."""

STYLE = """
:root {
  --page: #ffffff; --text: #1f2328; --soft: #59636e; --line: #d8dee4; --tile: #f6f8fa;
  --ours: #c2410c; --others: #475569; --grid: #e5e9ed; --shade: #e8ecf0; --faint: #94a3b8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d1117; --text: #e6edf3; --soft: #9198a1; --line: #30363d; --tile: #161b22;
    --ours: #f0883e; --others: #9fb0c3; --grid: #262c34; --shade: #1f2630; --faint: #6b7785;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; overflow-wrap: anywhere;
  background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif;
}
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
header p, figcaption, dt { color: var(--soft); }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0; padding: 0;
  list-style: none;
}
.tiles li { padding: .75rem 1rem; border-radius: .5rem; background: var(--tile); color: var(--soft); font-size: .875rem; }
.tiles b { display: block; color: var(--text); font-size: 1.375rem; line-height: 1.3; }
.figures { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 0 0 1rem; }
figure.narrow { flex: 1 1 20rem; max-width: 32rem; }
figure.wide { min-width: 38rem; max-width: 52rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { fill: var(--text); }
figcaption { margin-top: .25rem; font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .375rem .625rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; }
th:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--soft); vertical-align: bottom; white-space: normal; overflow-wrap: normal; }
tr > th:first-child { position: sticky; left: 0; background: var(--page); }
@media (max-width: 30rem) { th, td { padding-inline: .375rem; } }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--soft); }
dl { display: grid; grid-template-columns: minmax(8rem, auto) 1fr; gap: .25rem 1rem; font-size: .875rem; }
dd { margin: 0; }
li { margin: .25rem 0; }
:focus-visible { outline: 2px solid var(--ours); outline-offset: 2px; }
@media print { details::details-content { content-visibility: visible; } .scroll { overflow: visible; } }
"""
