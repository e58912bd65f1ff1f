"""Mixed traffic with faults at random, and the proof of what arrived."""
