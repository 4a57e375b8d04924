"""Methods side by side: which runs there are, what they come down to, tables and plots."""
