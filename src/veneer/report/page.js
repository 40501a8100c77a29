"use strict";
(() => {
  const charts = [...document.querySelectorAll(".chart")].map((place) => ({
    place,
    figure: JSON.parse(document.getElementById(place.dataset.figure).textContent),
  }));

  // The page's own colours, so that charts follow light, dark and print with everything else.
  function theme() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--line"), tickcolor: colour("--line") };
    return {
      font: { color: colour("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: colour("--wash"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--line"), activecolor: colour("--accent") },
      xaxis: axis,
      yaxis: axis,
    };
  }

  function template(figure) {
    const base = figure.layout.template || {};
    const own = theme();
    const layout = { ...(base.layout || {}), ...own };
    for (const key of ["font", "hoverlabel", "modebar", "xaxis", "yaxis"]) layout[key] = { ...((base.layout || {})[key] || {}), ...own[key] };
    return { ...base, layout };
  }

  const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  for (const { place, figure } of charts) {
    Plotly.newPlot(place, figure.data, { ...figure.layout, template: template(figure) }, options).then(() => { place.dataset.drawn = "yes"; });
  }
  const repaint = () => charts.forEach(({ place, figure }) => Plotly.relayout(place, { template: template(figure) }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  matchMedia("print").addEventListener("change", repaint);

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const first = [...body.rows];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.firstElementChild.addEventListener("click", () => {
        const turn = { none: "descending", descending: "ascending", ascending: "none" }[head.getAttribute("aria-sort") || "none"];
        for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", turn);
        const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
        const sign = turn === "ascending" ? 1 : -1;
        const rows = turn === "none" ? first : [...first].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === "" || y === "") return (x === "") - (y === "");  // what is missing stays last
          const [m, n] = [Number(x), Number(y)];
          return sign * (Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n);
        });
        body.append(...rows);
      });
    });
  }
})();
