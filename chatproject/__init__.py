"""The host site: how a project puts streaming_chat into its own pages. Nothing in it is reusable."""
