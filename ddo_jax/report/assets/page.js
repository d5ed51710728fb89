// The grids of the same seeds, one over the other: what is left of the line is the first, right of it the second.
function compare(root) {
  const figures = [...root.querySelectorAll("figure")];
  if (figures.length < 2) return;
  const box = document.createElement("div");
  box.className = "compare";
  box.innerHTML = `<div class="sides"><label>left <select></select></label><label>right <select></select></label></div>
    <div class="stage"><img alt=""><img alt=""><div class="line"></div></div>
    <input type="range" min="0" max="100" value="50" aria-label="how much of the left picture is shown, in per cent">`;
  const images = box.querySelectorAll("img"), selects = box.querySelectorAll("select");
  const line = box.querySelector(".line"), range = box.querySelector("input");
  const move = () => {
    images[1].style.clipPath = `inset(0 0 0 ${range.value}%)`;
    line.style.left = `${range.value}%`;
  };
  selects.forEach((select, side) => {
    figures.forEach((figure, i) => select.add(new Option(figure.querySelector("figcaption").textContent, i)));
    select.value = side;
    const show = () => {
      const chosen = figures[select.value].querySelector("img");
      images[side].src = chosen.src;
      images[side].alt = chosen.alt;
    };
    select.addEventListener("change", show);
    show();
  });
  range.addEventListener("input", move);
  move();
  root.replaceWith(box);
}

// Index of the value of a series that is nearest to the cursor, within the series: candidates are scored at different
// numbers of images.
function nearest(u, series, index) {
  if (series === 0 || u.data[series][index] != null) return index;
  const [x, y] = [u.data[0], u.data[series]];
  const there = [...y.keys()].filter((i) => y[i] != null);
  if (!there.length || index < there[0] || index > there[there.length - 1]) return null;
  return there.reduce((a, b) => (Math.abs(x[b] - x[index]) < Math.abs(x[a] - x[index]) ? b : a));
}

// A ring at the best value, and a cross where a search stopped a candidate.
function marks(u, series) {
  const draw = (x, y, shape, colour) => {
    const [left, top, r] = [u.valToPos(x, "x", true), u.valToPos(y, "y", true), 5 * devicePixelRatio];
    u.ctx.strokeStyle = colour;
    u.ctx.lineWidth = 1.5 * devicePixelRatio;
    u.ctx.beginPath();
    if (shape === "ring") u.ctx.arc(left, top, r, 0, 7);
    else [1, -1].forEach((s) => { u.ctx.moveTo(left - r, top - s * r); u.ctx.lineTo(left + r, top + s * r); });
    u.ctx.stroke();
  };
  series.forEach((s) => {
    const best = s.y.indexOf(Math.min(...s.y)), last = s.y.length - 1;
    draw(s.x[best], s.y[best], "ring", s.colour);
    if (s.stopped) draw(s.x[last], s.y[last], "cross", s.colour);
  });
}

function curves(root, { metric, series }) {
  const number = (u, v) => (v == null ? "–" : v.toPrecision(5));
  const lines = series.map((s) => ({
    label: s.label, stroke: s.colour, dash: s.dash ? [6, 4] : [], width: 1.5, spanGaps: true,
    points: { show: true, size: 5 }, value: number,
  }));
  const short = (u, values) => values.map((v) => +v.toPrecision(6));
  const width = () => Math.min(root.clientWidth || 900, 900);
  const options = {
    width: width(), height: 420,
    scales: { x: { time: false }, y: { range: (u, low, high) => [Math.min(0, 1.05 * low), Math.max(0, 1.05 * high)] } },
    axes: [{ label: "millions of real images since the start", values: short }, { label: metric, size: 70, values: short }],
    cursor: { dataIdx: nearest },
    hooks: { draw: [(u) => marks(u, series)] },
    series: [{ label: "millions of images", value: number }, ...lines],
  };
  const chart = new uPlot(options, uPlot.join(series.map((s) => [s.x, s.y])), root);
  addEventListener("resize", () => chart.setSize({ width: width(), height: 420 }));
}

document.querySelectorAll(".grids").forEach(compare);
if (report.curves) curves(document.querySelector("#curves"), report.curves);
