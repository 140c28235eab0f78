"""What upstream verl lacks for pass-rate-weighted on-policy self-distillation. Importing this package is free."""
