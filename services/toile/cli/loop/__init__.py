"""`toile run`: a whole loop, from a folder of photographs to a report, described by one file."""
