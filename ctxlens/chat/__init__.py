"""Conversations: who said which token (`roles`), and instruction data as conversations (`data`)."""
