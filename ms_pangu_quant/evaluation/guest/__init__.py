"""What runs inside the sandbox, as plain scripts of the standard library: never imported by the rest of the package."""
