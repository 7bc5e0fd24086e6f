"use strict";
// The table of single cases: search, filter, sort, and one case opened at a time on demand. Everything is in the page; nothing is fetched.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const body = document.querySelector("#cases-table tbody");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const controls = ["search", "line", "outcome"].map((id) => document.getElementById(id));
  const PAGE = 50;
  const WAYS = { qa: "in a frame", question: "as a question", chat: "in a chat", negation: "denied", leak: "same subject" };
  let shown = PAGE;
  let sorting = { by: null, down: false };

  const text = (value) => (value === undefined || value === null ? "–" : typeof value === "number" ? String(Math.round(100 * value)) : value);
  const right = (one) => (one.values.reliability ?? one.values.efficacy_top) === 1;
  const outcomes = {
    all: () => true,
    held: (one) => right(one) && one.values.exact === 1,
    mirage: (one) => right(one) && one.values.exact < 1,
    missed: (one) => !one.error && !right(one),
    failed: (one) => one.error !== undefined,
    harmed: (one) => data.cost.some((name) => one.values[name] < 1),
  };
  for (const one of data.cases) {
    one.prompt = one.said.map((said) => said.prompt).join(" · ") || one.case;
    one.answer = one.said.map((said) => said.answers[0]).join(" · ");
    const others = [...one.questions.flatMap((said) => [said.prompt, said.text]), ...(one.ways || []).flatMap(([, prompt, , said]) => [prompt, said])];
    one.hay = [one.prompt, one.answer, ...one.said.map((said) => said.text), ...others, one.error, one.case, one.line].join("\n").toLowerCase();
  }
  const key = (one) => (sorting.by in one.values ? one.values[sorting.by] : one[sorting.by]);

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
    made.append(...children);
    return made;
  }

  function strip(one) {
    const made = element("div", { class: "strip" });
    one.tokens.forEach((token, i) => {
      const off = one.top[i] !== token;
      const below = off ? `${Math.round(100 * one.p[i])} % · on top: ${one.top[i]}` : `${Math.round(100 * one.p[i])} %`;
      made.append(element("span", { class: off ? "token off" : "token" }, token, element("small", {}, below)));
    });
    return made;
  }

  function details(one) {
    const made = element("div", { class: "inner" });
    if (one.error) made.append(element("p", {}, `Not edited: ${one.error}`));
    const say = (title, list) => {
      if (!list.length) return;
      made.append(element("p", { class: "soft" }, title));
      made.append(element("ul", {}, ...list.map((said) =>
        element("li", {}, element("span", { class: "soft" }, `${said.prompt} `), said.text.trim() || "(nothing)", element("span", { class: "soft" }, ` — asked for: ${said.answers.join(" / ")}`)))));
    };
    say("Written by itself, greedily, to the end of the line:", one.said);
    if (one.strips.length) {
      made.append(element("p", { class: "soft" }, "Led by the answer: each token's probability; dashed where another one is on top."));
      made.append(...one.strips.map(strip));
    }
    say("Other questions:", one.questions);
    if (one.ways) {
      made.append(element("p", { class: "soft" }, "Asked in other ways, and where the new answer does not belong:"));
      made.append(element("ul", {}, ...one.ways.map(([way, prompt, target, said]) => {
        const wrong = way === "negation" || way === "leak";
        return element("li", {}, element("span", { class: "soft" }, `${prompt} `), said || "(nothing)",
          element("span", { class: "soft" }, wrong ? ` — ${WAYS[way]}, not to be: ${target}` : ` — ${WAYS[way]}, asked for: ${target}`));
      })));
    }
    made.append(element("p", { class: "soft" }, `${one.line}, case ${one.case}, seed ${one.seed}`));
    return element("td", { colspan: String(4 + data.columns.length), class: "text" }, made);
  }

  const opened = new Set(); // cases stay open while others are searched for

  function row(one) {
    const open = element("button", { type: "button" });
    const cells = [element("td", {}, open), element("td", { class: "text" }, one.line), element("td", { class: "text" }, one.prompt),
      element("td", { class: "text" }, one.answer), ...data.columns.map((name) => element("td", {}, text(one.values[name])))];
    const made = element("tr", {}, ...cells);
    const tell = (now) => {
      open.setAttribute("aria-expanded", String(now));
      open.setAttribute("aria-label", `${now ? "hide" : "show"} case ${one.case}`);
      open.textContent = now ? "–" : "+";
    };
    const below = () => element("tr", { class: "open" }, details(one));
    open.addEventListener("click", () => {
      if (opened.delete(one)) made.nextSibling.remove();
      else { opened.add(one); made.after(below()); }
      tell(opened.has(one));
    });
    tell(opened.has(one));
    return opened.has(one) ? [made, below()] : [made];
  }

  function draw() {
    const [search, line, outcome] = controls.map((control) => control.value);
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    let found = data.cases.filter((one) => (!line || one.line === line) && outcomes[outcome](one) && words.every((word) => one.hay.includes(word)));
    if (sorting.by) {
      const sign = sorting.down ? -1 : 1;
      const order = (a, b) => (a === b ? 0 : a === undefined ? 1 : b === undefined ? -1 : a < b ? -sign : sign);
      found = [...found].sort((a, b) => order(key(a), key(b)));
    }
    body.replaceChildren(...found.slice(0, shown).flatMap(row));
    count.textContent = `${found.length} of ${data.cases.length} cases${found.length > shown ? `, the first ${shown} shown` : ""}`;
    more.hidden = found.length <= shown;
  }

  for (const control of controls) control.addEventListener("input", () => { shown = PAGE; draw(); });
  document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => { shown += 4 * PAGE; draw(); });
  for (const button of document.querySelectorAll("#cases-table th button")) {
    button.addEventListener("click", () => {
      const by = button.dataset.by;
      sorting = { by, down: sorting.by === by && !sorting.down };
      for (const heading of document.querySelectorAll("#cases-table th")) heading.removeAttribute("aria-sort");
      button.closest("th").setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
      draw();
    });
  }
  draw();
})();
