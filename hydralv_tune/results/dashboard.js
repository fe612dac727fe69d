// Added to the Optuna dashboard: hides what is refused while it is for reading, and says why;
// says by which rule importances are computed, and where there are too few trials for any.
const HIDDEN = ["rename study", "delete study", "delete artifact", "skip trial"]
  .map((label) => `button[aria-label="${label}"]`)
  .concat(['button:has(svg[data-testid="EditIcon"])', ".hydralv-refused"]);
const REFUSED = ["Fail Trial", "Create", "Upload a New File"];

// Trials side by side share the width of the window; what is wide in one scrolls there.
const widths = document.createElement("style");
widths.textContent = ".MuiBox-root, .MuiCard-root { min-width: 0; } td, code { overflow-wrap: anywhere; }"
  + "@media (max-width: 700px) { .MuiGrid-item { flex-basis: 100% !important; max-width: 100% !important; } }";
document.head.append(widths);

if (!writable) {
  const style = document.createElement("style");
  style.textContent = `${HIDDEN.join(",")} { display: none !important; }`;
  document.head.append(style);
}

function hideRefused() {
  for (const element of document.querySelectorAll("button, .MuiCardContent-root")) {
    const text = element.textContent.trim();
    if (REFUSED.some((word) => text === word || (word.startsWith("Upload") && text.startsWith(word)))) {
      element.classList.add("hydralv-refused");
    }
  }
  if (document.querySelector("#hydralv-reading") || !document.querySelector("header")) return;
  const line = document.createElement("div");
  line.id = "hydralv-reading";
  line.textContent = "For reading only. Start hydralv-tune dashboard with --writable to change studies.";
  line.style.cssText = "position:fixed;left:50%;bottom:10px;transform:translateX(-50%);z-index:2000;padding:5px 14px;"
    + "border-radius:14px;font:13px/1.4 sans-serif;background:#1c2430;color:#fff;max-width:92vw;";
  document.body.append(line);
}

const importances = {};

async function explainImportance() {
  const match = location.pathname.match(/studies\/(\d+)/);
  if (!match) return;
  for (const heading of document.querySelectorAll("h5, h6")) {
    const isImportance = /^(Hyperparameter )?Importance/.test(heading.textContent.trim());
    if (!isImportance || heading.dataset.explained === match[1]) continue;
    heading.dataset.explained = match[1];
    importances[match[1]] ??= fetch(`/api/studies/${match[1]}/param_importances`).then((r) => r.json());
    const rows = (await importances[match[1]]).param_importances?.[0] ?? [];
    const line = document.createElement("p");
    line.className = "hydralv-importance";
    line.style.cssText = "margin:4px 0;font:14px/1.4 sans-serif;opacity:.8";
    line.textContent = rows.length
      ? "PED-ANOVA over the complete trials, as in the report."
      : "Fewer than 20 complete trials: too early to say which parameter matters.";
    heading.after(line);
  }
}

new MutationObserver(() => {
  if (!writable) hideRefused();
  explainImportance();
}).observe(document.documentElement, { childList: true, subtree: true });
