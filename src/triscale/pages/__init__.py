"""HTML pages that are looked at without a network: elements that escape, one style, charts as SVG."""
