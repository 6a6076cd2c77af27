"""What is fitted on calibration text: profiles, damages, compensations."""
