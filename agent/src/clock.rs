//! The wall clock, for expiry and for record counters; trust never rests on it alone.

use std::time::{SystemTime, UNIX_EPOCH};

use connect_spec::objects::UnixTime;

/// Seconds since 1970, as this machine's clock tells it; 0 for a clock set before that.
pub(crate) fn now() -> UnixTime {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
