"""Made-up scenes with exact masks: cut-outs on backgrounds, copied objects, procedural shapes."""
