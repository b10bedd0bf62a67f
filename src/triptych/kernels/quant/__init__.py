"""Number formats of DeepSeek-V4: FP8 e4m3 and FP4 e2m1 with power-of-two scales, and the byte pages that hold them."""
