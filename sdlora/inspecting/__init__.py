"""What an adapter file or a base model holds, for people."""
