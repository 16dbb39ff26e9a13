"""`dsgnn-bench report` and `compare`: results as one page, as Markdown, and against each other."""
