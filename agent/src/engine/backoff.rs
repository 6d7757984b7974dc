//! When to try again after a failure: exponential, capped, with full jitter, for ever.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(16);
/// A hub that asks to stay away for longer is not heeded: what it says is not trusted.
const LONGEST_ASKED: Duration = Duration::from_secs(60);

/// The delays between attempts: random below 100 ms, 200 ms, … 16 s.
///
/// Full jitter, so that agents whose hub restarted do not all come back at once.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The wait after one more failure; `random` is uniform over all of `u32`.
    pub(crate) fn next(&mut self, random: u32) -> Duration {
        let ceiling = FIRST.saturating_mul(1 << self.failures.min(16)).min(LAST);
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(f64::from(random) / f64::from(u32::MAX))
    }

    /// As [`Backoff::next`], and not before the time that the other side `asked` for: after it, at random,
    /// since it asked others too.
    pub(crate) fn next_after(&mut self, asked: Option<Duration>, random: u32) -> Duration {
        asked.unwrap_or_default().min(LONGEST_ASKED) + self.next(random)
    }

    /// Forgets the failures after a success.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_cap_and_start_over() {
        let mut backoff = Backoff::default();
        let longest: Vec<_> = (0..9).map(|_| backoff.next(u32::MAX).as_millis()).collect();
        assert_eq!(longest, [100, 200, 400, 800, 1600, 3200, 6400, 12_800, 16_000]);
        assert_eq!(backoff.next(0), Duration::ZERO);
        backoff.reset();
        assert_eq!(backoff.next(u32::MAX), FIRST);
        let asked = Duration::from_secs(30);
        assert_eq!(backoff.next_after(Some(asked), 0), asked);
        assert_eq!(backoff.next_after(Some(Duration::MAX), u32::MAX), LONGEST_ASKED + FIRST * 4);
        for _ in 0..1000 {
            assert!(backoff.next(u32::MAX) <= LAST);
        }
    }
}
