"""View: what people look at; HTML, figures, reports, the live page."""
