"""Reading labelled and plain text: from a file, the hub, or the examples that come with the demo's packages."""
