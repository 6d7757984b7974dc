//! Notices that the machine slept, or that its network is another one, from looks once a second.

use std::{
    fmt,
    net::IpAddr,
    time::{Duration, Instant},
};

/// The wall clock runs ahead of the monotonic one by this much only when the machine slept, or when
/// somebody set the clock; then a needless reconnect does no harm.
const ASLEEP: Duration = Duration::from_secs(5);

/// What the machine shows at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Look {
    /// A clock that stands still while the machine sleeps.
    pub(crate) monotonic: Instant,
    /// A clock that does not, since any fixed moment.
    pub(crate) wall: Duration,
    /// How this machine would speak to the hub.
    pub(crate) way: Way,
}

/// The way from this machine to its hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Not known: the hub was never found.
    Unknown,
    /// There is none.
    Closed,
    /// From this own address.
    From(IpAddr),
}

/// Why sockets that are open may lead nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// The machine slept for about so long.
    Slept(Duration),
    /// There is another way to the hub, or one again.
    Network,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slept(time) => write!(f, "the machine slept for {} s", time.as_secs()),
            Self::Network => write!(f, "the way to the hub is another one"),
        }
    }
}

/// What was seen last.
#[derive(Debug, Default)]
pub(crate) struct Surroundings {
    last: Option<Look>,
}

impl Surroundings {
    /// Compares with the last look.
    ///
    /// A network that goes away is no change: there is nothing to try then. One that comes back is, also
    /// with the address of before: TCP still waits for its next try by then. The first way that is known is
    /// none: it is that of the connection which was just made.
    pub(crate) fn look(&mut self, look: Look) -> Option<Change> {
        let last = self.last.replace(look)?;
        let passed = look.monotonic.duration_since(last.monotonic);
        // A wall clock that was set back shows no sleep.
        let by_wall = look.wall.saturating_sub(last.wall);
        let ahead = by_wall.saturating_sub(passed);
        if ahead > ASLEEP {
            return Some(Change::Slept(ahead));
        }
        let is_known = last.way != Way::Unknown && matches!(look.way, Way::From(_));
        (is_known && look.way != last.way).then_some(Change::Network)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const HOME: Way = Way::From(IpAddr::V4(std::net::Ipv4Addr::new(192, 168, 0, 2)));
    const ROAD: Way = Way::From(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 7)));

    /// Two looks, between which the clocks and the way changed so.
    fn seen(
        monotonic: Duration,
        wall: impl FnOnce(Duration) -> Duration,
        before: Way,
        after: Way,
    ) -> Option<Change> {
        let first = Look { monotonic: Instant::now(), wall: 1_000_000 * SECOND, way: before };
        let second =
            Look { monotonic: first.monotonic + monotonic, wall: wall(first.wall), way: after };
        let mut surroundings = Surroundings::default();
        assert_eq!(surroundings.look(first), None, "there is nothing to compare with");
        let change = surroundings.look(second);
        assert_eq!(surroundings.look(second), None, "each change is told once");
        change
    }

    #[test]
    fn sleep_is_what_only_the_wall_clock_saw() {
        let hour = 3600 * SECOND;
        assert_eq!(seen(SECOND, |wall| wall + SECOND, HOME, HOME), None);
        assert_eq!(seen(SECOND, |wall| wall + SECOND + ASLEEP, HOME, HOME), None);
        let just = ASLEEP + Duration::from_millis(1);
        assert_eq!(
            seen(SECOND, |wall| wall + SECOND + just, HOME, HOME),
            Some(Change::Slept(just))
        );
        assert_eq!(
            seen(SECOND, |wall| wall + SECOND + hour, Way::Closed, Way::Closed),
            Some(Change::Slept(hour))
        );
    }

    #[test]
    fn stopped_or_slow_process_did_not_sleep() {
        let hour = 3600 * SECOND;
        assert_eq!(seen(hour, |wall| wall + hour, HOME, HOME), None);
    }

    #[test]
    fn wall_clock_that_is_set_back_is_no_sleep() {
        assert_eq!(seen(SECOND, |wall| wall - 3600 * SECOND, HOME, HOME), None);
    }

    #[test]
    fn another_way_and_a_way_again_are_changes_and_no_way_is_none() {
        let a_second = |before, after| seen(SECOND, |wall| wall + SECOND, before, after);
        assert_eq!(a_second(HOME, ROAD), Some(Change::Network));
        assert_eq!(a_second(Way::Closed, ROAD), Some(Change::Network));
        assert_eq!(a_second(HOME, Way::Closed), None);
        assert_eq!(a_second(Way::Closed, Way::Closed), None);
    }

    #[test]
    fn first_way_that_is_known_is_no_change() {
        let a_second = |before, after| seen(SECOND, |wall| wall + SECOND, before, after);
        assert_eq!(a_second(Way::Unknown, HOME), None);
        assert_eq!(a_second(Way::Unknown, Way::Closed), None);
        assert_eq!(a_second(Way::Unknown, Way::Unknown), None);
    }
}
