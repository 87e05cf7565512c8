"""The style sheet of reports: a column of text and one of headings, two themes, nothing loaded from elsewhere."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --ink: #1c2127; --muted: #5d656e; --rule: #dfdfd8; --soft: #f2f2ec;
  --accent: #1f5f99; --on-accent: #ffffff; --pale: #a9c5dd; --second: #b5590f; --rest: #b4b8bc;
  --accepted: #d9efdc; --accepted-line: #2c7a43; --corrected: #fbe6c4; --corrected-line: #a85d00;
  --bad: #a3261c; --heat: #1f6db3;
  --s0: #1f5f99; --s1: #c4661f; --s2: #2c7a43; --s3: #7d4aa5; --s4: #0f7c86; --s5: #a0315f; --s6: #6d6a1e;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e4e6e8; --muted: #9aa3ac; --rule: #2f353b; --soft: #1c2024;
    --accent: #6cb0ea; --on-accent: #0d1115; --pale: #3b5f80; --second: #eb9a58; --rest: #5b636b;
    --accepted: #1d3d27; --accepted-line: #6fcb8a; --corrected: #4a3511; --corrected-line: #f0b45a;
    --bad: #f08a80; --heat: #4a8fce;
    --s0: #6cb0ea; --s1: #eb9a58; --s2: #6fcb8a; --s3: #bf97e3; --s4: #54c4ce; --s5: #ec86b0; --s6: #cdc765;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 var(--sans);
  overflow-wrap: anywhere; }
.page { max-width: 1136px; margin: 0 auto; padding: 72px 32px 48px; }
h1, h2, h3, p, ul, figure, dl, dd, pre { margin: 0; padding: 0; }
.kind { color: var(--muted); font-size: 14px; letter-spacing: .02em; }
h1 { font-size: 40px; line-height: 1.15; font-weight: 650; letter-spacing: -.02em; margin: 12px 0 16px; }
.lead { max-width: 44em; font-size: 18px; line-height: 1.55; }
.lead + .lead { margin-top: 8px; }
.keys { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 24px 32px;
  margin: 40px 0 0; }
.keys > div { border-top: 2px solid var(--ink); padding-top: 10px; }
.keys dt { color: var(--muted); font-size: 14px; line-height: 1.4; }
.keys dd { font-size: 26px; line-height: 1.3; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
section { display: grid; grid-template-columns: 212px minmax(0, 1fr); gap: 0 48px; margin-top: 72px;
  padding-top: 24px; border-top: 1px solid var(--rule); }
.body { min-width: 0; }
.body > * + * { margin-top: 36px; }
h2 { font-size: 20px; line-height: 1.3; font-weight: 650; letter-spacing: -.01em; }
h3 { font-size: 16px; line-height: 1.4; font-weight: 650; }
.note { color: var(--muted); font-size: 14px; line-height: 1.55; margin-top: 8px; }
.scroll { overflow-x: auto; overscroll-behavior-x: contain; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; line-height: 1.45;
  font-variant-numeric: tabular-nums; }
th, td { padding: 9px 0 9px 24px; text-align: right; vertical-align: baseline; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
th { font-weight: 400; color: var(--muted); }
thead th { border-bottom: 1px solid var(--ink); vertical-align: bottom; font-size: 13px; }
tbody th { color: var(--ink); font-weight: 500; }
.words { text-align: left; }
.scroll th:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 11em; }
td.words { white-space: normal; min-width: 9em; }
tbody th small, td small { display: block; color: var(--muted); font-size: 13px; font-weight: 400; }
tr.best > * { font-weight: 650; }
.pairs th { width: 34%; font-weight: 400; color: var(--muted); white-space: normal; }
.pairs td { white-space: normal; overflow-wrap: anywhere; text-align: left; }
.plot { min-width: 0; }
.plot svg { display: block; width: 100%; height: auto; overflow: visible; }
.wide svg { min-width: 640px; }
.square .wide { max-width: 540px; }
.square .wide svg { min-width: 0; }
.fixed svg { min-width: 0; }
.narrow { display: none; }
h3 + * { margin-top: 12px; }
figcaption { color: var(--muted); font-size: 14px; line-height: 1.5; margin-top: 12px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 24px; list-style: none; font-size: 14px; margin-bottom: 16px; }
.legend li { display: flex; align-items: center; gap: 8px; min-width: 0; }
.legend .pieces { flex: none; }
.legend svg { flex: none; width: 26px; height: 12px; }
svg text { font-family: var(--sans); font-size: 13px; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .muted { fill: var(--muted); }
svg .strong { font-weight: 650; }
svg .on { fill: var(--on-accent); }
svg .axis { stroke: var(--muted); stroke-width: 1; fill: none; }
svg .grid { stroke: var(--rule); stroke-width: 1; fill: none; }
svg .whisker { stroke: var(--ink); stroke-width: 1.5; fill: none; }
svg .halo { stroke: var(--paper); stroke-width: 4; fill: none; }
svg .best { stroke: var(--ink); stroke-width: 2.5; fill: none; }
svg .diagonal { stroke: var(--muted); stroke-width: 1.5; stroke-dasharray: 5 4; fill: none; }
svg .paper { fill: var(--paper); }
pre { font: 13px/1.6 var(--mono); background: var(--soft); padding: 16px 20px; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; tab-size: 4; }
pre + h3, pre + .note { margin-top: 24px; }
details { border-bottom: 1px solid var(--rule); }
details > summary { cursor: pointer; padding: 12px 0; font-size: 15px; }
details > summary code { font-size: 13px; }
details > div { padding: 4px 0 32px; }
.body > details + details { margin-top: 0; }
code { font: 13px/1.5 var(--mono); }
.text + .text { margin-top: 24px; }
.text h3 { font-size: 14px; }
.text h3 small { color: var(--muted); font-size: 13px; font-weight: 400; margin-left: 8px; }
.text pre { margin-top: 8px; }
.pieces { line-height: 1.9; }
.pieces span, .legend .pieces span { -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.accepted { background: var(--accepted); border-bottom: 2px solid var(--accepted-line); margin-right: 1px; }
.corrected { background: var(--corrected); border-bottom: 2px dashed var(--corrected-line); font-weight: 700;
  margin-right: 1px; }
.bonus { border-bottom: 2px dotted var(--muted); margin-right: 1px; }
.bad { color: var(--bad); font-weight: 650; }
footer { margin-top: 72px; padding-top: 20px; border-top: 1px solid var(--rule); color: var(--muted); font-size: 13px; }
@media (max-width: 900px) {
  section { grid-template-columns: minmax(0, 1fr); margin-top: 56px; }
  section > header { margin-bottom: 24px; }
  section > header .note { max-width: 44em; }
}
@media (max-width: 600px) {
  .page { padding: 40px 20px 32px; }
  h1 { font-size: 31px; }
  .lead { font-size: 17px; }
  .keys { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px; margin-top: 32px; }
  .keys dd { font-size: 21px; }
  .wide { display: none; }
  .narrow { display: block; }
  th, td { padding-left: 18px; }
  .scroll th:first-child { position: sticky; left: 0; min-width: 8em; max-width: 10em; background: var(--paper); }
  pre { padding: 14px 16px; }
}
@media print {
  .page { padding: 0; max-width: none; }
  section, details { break-inside: avoid-page; }
}
"""
