"""OpenVINO on the CPU, on Intel's integrated GPU or on its NPU."""
