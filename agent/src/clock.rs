//! The wall clock, for expiry and for record counters; trust never rests on it alone.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use connect_spec::objects::UnixTime;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Seconds since 1970, as this machine's clock tells it; 0 for a clock set before that.
pub(crate) fn now() -> UnixTime {
    since_1970().as_secs()
}

/// As [`now`], to the nanosecond.
pub(crate) fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Seconds since 1970 as RFC 3339 writes them, for people.
#[must_use]
pub fn date(time: UnixTime) -> String {
    i64::try_from(time)
        .ok()
        .and_then(|time| OffsetDateTime::from_unix_timestamp(time).ok())
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_else(|| "at no time".to_owned())
}
