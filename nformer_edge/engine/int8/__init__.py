"""What an INT8 build decides: its calibration, and which nodes stay in float so that an accuracy budget holds."""
