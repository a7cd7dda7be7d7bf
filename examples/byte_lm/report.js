"use strict";
// Two small things: the values under the pointer in line charts, and what the colors of the text stand for.
(() => {
  const tip = document.getElementById("tip");

  function show(event, text) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.min(event.clientX + 14, innerWidth - box.width - 8) + "px";
    tip.style.top = Math.max(8, event.clientY - box.height - 12) + "px";
  }

  for (const svg of document.querySelectorAll("svg[data-x]")) {
    const [xLow, xHigh, xStart, xEnd] = svg.dataset.x.split(",").map(Number);
    const [yLow, yHigh, yStart, yEnd, log] = svg.dataset.y.split(",").map(Number);
    const cursor = svg.querySelector(".cursor");
    const lines = [...svg.querySelectorAll("polyline")].filter((line) => !line.classList.contains("faint"))
      .map((line) => ({ name: line.dataset.name, points: [...line.points] }));
    const valueAt = (y) => {
      const part = (y - yStart) / (yEnd - yStart);
      return log ? yLow * (yHigh / yLow) ** part : yLow + part * (yHigh - yLow);
    };
    svg.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      if (at.x < xStart || at.x > xEnd) return leave();
      const nearest = lines.map(({ name, points }) => {
        const point = points.reduce((a, b) => (Math.abs(b.x - at.x) < Math.abs(a.x - at.x) ? b : a));
        return { name, point };
      });
      const x = nearest[0].point.x;
      const step = xLow + ((x - xStart) / (xEnd - xStart)) * (xHigh - xLow);
      for (const [name, value] of [["x1", x], ["x2", x], ["y1", yEnd], ["y2", yStart]]) cursor.setAttribute(name, value);
      cursor.removeAttribute("hidden");
      const values = nearest.map(({ name, point }) => `${name}  ${valueAt(point.y).toFixed(2)}`);
      show(event, [`${svg.dataset.xLabel} ${Math.round(step).toLocaleString("en")}`, ...values].join("\n"));
    });
    function leave() { tip.hidden = true; cursor.setAttribute("hidden", ""); }
    svg.addEventListener("pointerleave", leave);
  }

  const text = document.getElementById("text");
  if (!text) return;
  const data = JSON.parse(document.getElementById("text-data").textContent);
  const spans = [...text.querySelectorAll("span")];
  const legend = document.getElementById("legend");

  function paint(index) {
    const view = data.views[index];
    const last = data.levels - 1;
    spans.forEach((span, i) => {
      const part = (view.values[i] - view.low) / (view.high - view.low);
      const level = Math.max(0, Math.min(last, Math.round(part * last)));
      span.className = `ink${level} back${level}` + (span.textContent.includes("\n") ? " end" : "");
    });
    legend.querySelector(".from").textContent = view.first;
    legend.querySelector(".to").textContent = view.last;
  }

  document.getElementById("view").addEventListener("change", (event) => paint(Number(event.target.value)));
  text.addEventListener("pointerover", (event) => {
    const i = spans.indexOf(event.target);
    if (i < 0) return void (tip.hidden = true);
    show(event, data.views.map((view) => `${view.name}  ${view.values[i]}`).join("\n"));
  });
  text.addEventListener("pointerleave", () => { tip.hidden = true; });
})();
