//! The wall clock, for expiry and for record counters; trust never rests on it alone.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use connect_spec::objects::UnixTime;

/// Seconds since 1970, as this machine's clock tells it; 0 for a clock set before that.
pub(crate) fn now() -> UnixTime {
    since_1970().as_secs()
}

/// As [`now`], to the nanosecond.
pub(crate) fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
