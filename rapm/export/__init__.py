"""The student as files that every client loads: names, proofs, card, workflow, merged pipeline, hub."""
