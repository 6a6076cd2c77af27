"""What is fitted with gradients on calibration text: predicted damages, learned compensation."""
