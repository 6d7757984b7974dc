//! How much of something may still be had now.

use std::time::{Duration, Instant};

/// A token bucket: so many tokens a second, of which so many can be saved.
#[derive(Debug)]
pub struct Bucket {
    interval: Duration,
    size: u32,
    level: u32,
    filled_at: Instant,
}

impl Bucket {
    /// A full bucket of `size` tokens that gets `rate` new ones in a second.
    #[must_use]
    pub fn new(rate: u32, size: u32, now: Instant) -> Self {
        Self { interval: Duration::from_secs(1) / rate, size, level: size, filled_at: now }
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled_at);
        let earned = elapsed.as_nanos() / self.interval.as_nanos();
        match u32::try_from(earned) {
            Ok(earned) if earned < self.size - self.level => {
                self.level += earned;
                self.filled_at += self.interval * earned;
            }
            Ok(_) | Err(_) => {
                self.level = self.size;
                self.filled_at = now;
            }
        }
    }

    /// Takes a token.
    ///
    /// # Errors
    /// How long until there is one.
    pub fn take(&mut self, now: Instant) -> Result<(), Duration> {
        self.fill(now);
        if self.level == 0 {
            return Err(self.interval - now.saturating_duration_since(self.filled_at));
        }
        self.level -= 1;
        Ok(())
    }

    /// Whether it is as good as a new one.
    pub fn is_full(&mut self, now: Instant) -> bool {
        self.fill(now);
        self.level == self.size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_at_their_rate_and_no_more_are_saved_than_fit() {
        let start = Instant::now();
        let mut bucket = Bucket::new(10, 3, start);
        let at = |millis| start + Duration::from_millis(millis);
        assert!(bucket.is_full(start));
        for _ in 0..3 {
            assert_eq!(bucket.take(start), Ok(()));
        }
        assert_eq!(bucket.take(at(40)), Err(Duration::from_millis(60)));
        assert_eq!(bucket.take(at(100)), Ok(()));
        assert_eq!(bucket.take(at(199)), Err(Duration::from_millis(1)));
        assert_eq!(bucket.take(at(200)), Ok(()));
        assert!(!bucket.is_full(at(499)) && bucket.is_full(at(500)));
        for _ in 0..3 {
            assert_eq!(bucket.take(at(90_000)), Ok(()));
        }
        assert!(bucket.take(at(90_000)).is_err());
    }
}
