"""Pictures and token stores on disk: image files, sources of items, the training loader, stores, importers."""
