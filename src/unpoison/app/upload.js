// An image that is dropped on the page, or chosen, is the body of a request; what the server refuses is said in
// one line.
const upload = async (file) => {
  const [drop, refused] = ["#drop", "#refused"].map((one) => document.querySelector(one));
  if (!drop || !file) return;
  refused.textContent = "";
  if (file.size > Number(drop.dataset.limit)) {
    refused.textContent = `${file.name}: is larger than ${drop.dataset.limit >> 20} MiB; make it smaller`;
    return;
  }
  try {
    const answer = await fetch(`/upload?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
    if (!answer.ok) refused.textContent = await answer.text();
  } catch {
    refused.textContent = `${file.name}: could not be sent`;
  }
};
document.addEventListener("change", async (event) => {
  if (event.target.id !== "upload") return;
  await upload(event.target.files[0]);
  event.target.value = "";
});
for (const kind of ["dragover", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // or else the browser opens the file in place of the page
    if (kind === "drop") upload(event.dataTransfer.files[0]);
  });
