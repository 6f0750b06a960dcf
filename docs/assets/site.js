// The filter of the compatibility matrix: hides rows that do not match, and opens the libraries that have some.
document.querySelectorAll(".matrix-filter").forEach(field => {
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean)
    document.querySelectorAll("details.matrix").forEach(library => {
      const title = library.querySelector("summary").textContent.toLowerCase()
      const rows = [...library.querySelectorAll("tbody tr")]
      const shown = rows.filter(row => {
        const text = title + " " + row.cells[0].textContent.toLowerCase()
        row.hidden = !words.every(word => text.includes(word))
        return !row.hidden
      })
      library.hidden = shown.length === 0
      library.open = words.length > 0 && shown.length > 0
    })
  })
})
