// The filter of a page of long tables: hides rows that do not match, and opens the sections that have some.
document.querySelectorAll(".filter").forEach(field => {
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean)
    document.querySelectorAll("details.table").forEach(section => {
      const title = section.querySelector("summary").textContent.toLowerCase()
      const rows = [...section.querySelectorAll("tbody tr")]
      const shown = rows.filter(row => {
        const text = title + " " + row.cells[0].textContent.toLowerCase()
        row.hidden = !words.every(word => text.includes(word))
        return !row.hidden
      })
      section.hidden = shown.length === 0
      section.open = words.length > 0 && shown.length > 0
    })
  })
})
