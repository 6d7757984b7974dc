//! How much of something may be had now.

use std::time::{Duration, Instant};

/// So many at once, and so many a second: kept as the moment at which nothing is owed any more.
#[derive(Debug, Clone, Copy)]
pub struct Bucket {
    settled: Instant,
}

impl Bucket {
    /// One of which nothing was taken yet.
    #[must_use]
    pub fn full(now: Instant) -> Self {
        Self { settled: now }
    }

    /// Takes one.
    ///
    /// # Errors
    /// After which time there is one.
    pub fn take(&mut self, per_sec: u32, at_once: u32, now: Instant) -> Result<(), Duration> {
        let one = Duration::from_secs(1) / per_sec;
        let owed = self.settled.saturating_duration_since(now) + one;
        match owed.checked_sub(one * at_once).filter(|wait| !wait.is_zero()) {
            Some(wait) => Err(wait),
            None => {
                self.settled = now + owed;
                Ok(())
            }
        }
    }

    /// Whether it is as good as a new one.
    #[must_use]
    pub fn is_full(&self, now: Instant) -> bool {
        self.settled <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_come_at_their_rate_and_no_more_are_saved_than_may_be_had_at_once() {
        let start = Instant::now();
        let mut bucket = Bucket::full(start);
        let at = |millis| start + Duration::from_millis(millis);
        let mut take = |millis| bucket.take(10, 3, at(millis));
        for _ in 0..3 {
            assert_eq!(take(0), Ok(()));
        }
        assert_eq!(take(40), Err(Duration::from_millis(60)));
        assert_eq!(take(100), Ok(()));
        assert_eq!(take(199), Err(Duration::from_millis(1)));
        assert_eq!(take(200), Ok(()));
        assert!(!bucket.is_full(at(499)) && bucket.is_full(at(500)));
        for _ in 0..3 {
            assert_eq!(bucket.take(10, 3, at(90_000)), Ok(()));
        }
        assert!(bucket.take(10, 3, at(90_000)).is_err());
    }
}
