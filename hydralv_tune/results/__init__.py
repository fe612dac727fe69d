"""What people take away: the best trial, exports, report and dashboard."""
