"""What `import hydralv_tune` gives to scripts and notebooks: arrays in, arrays out."""
