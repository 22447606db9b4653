"""Programs that measure trainings; none of them keeps what it trains."""
