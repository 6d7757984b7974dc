//! Notices that the machine slept, or that its network is another one, from looks once a second.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
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
    /// The way to the hub; `None` while no hub was found yet.
    pub(crate) way: Option<Way>,
}

/// How the machine's packets would go to the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Way {
    /// Where the hub was last found. A hub at another address is reached another way, and by new sockets.
    pub(crate) hub: SocketAddr,
    /// The address that they would come from; `None` while there is no way.
    pub(crate) own: Option<IpAddr>,
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
    /// with the address of before: TCP still waits for its next try by then.
    pub(crate) fn look(&mut self, look: Look) -> Option<Change> {
        let last = self.last.replace(look)?;
        let passed = look.monotonic.duration_since(last.monotonic);
        // A wall clock that was set back shows no sleep.
        let by_wall = look.wall.saturating_sub(last.wall);
        let ahead = by_wall.saturating_sub(passed);
        if ahead > ASLEEP {
            return Some(Change::Slept(ahead));
        }
        let (before, after) = (last.way?, look.way?);
        let is_other = after.own.is_some() && after.own != before.own;
        (is_other && after.hub == before.hub).then_some(Change::Network)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const HUB: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)), 443);
    const HOME: Option<Way> = from([192, 168, 0, 2]);
    const ROAD: Option<Way> = from([10, 0, 0, 7]);
    const NO_WAY: Option<Way> = Some(Way { hub: HUB, own: None });

    const fn from([a, b, c, d]: [u8; 4]) -> Option<Way> {
        Some(Way { hub: HUB, own: Some(IpAddr::V4(std::net::Ipv4Addr::new(a, b, c, d))) })
    }

    /// Two looks, between which the clocks and the way changed so.
    fn seen(
        monotonic: Duration,
        wall: impl FnOnce(Duration) -> Duration,
        before: Option<Way>,
        after: Option<Way>,
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
            seen(SECOND, |wall| wall + SECOND + hour, None, None),
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

    fn a_second(before: Option<Way>, after: Option<Way>) -> Option<Change> {
        seen(SECOND, |wall| wall + SECOND, before, after)
    }

    #[test]
    fn another_way_and_a_way_again_are_changes_and_no_way_is_none() {
        assert_eq!(a_second(HOME, ROAD), Some(Change::Network));
        assert_eq!(a_second(NO_WAY, ROAD), Some(Change::Network));
        assert_eq!(a_second(HOME, NO_WAY), None);
        assert_eq!(a_second(NO_WAY, NO_WAY), None);
    }

    #[test]
    fn a_hub_that_is_found_and_one_that_moved_are_no_changes() {
        assert_eq!(a_second(None, HOME), None);
        let moved = ROAD.map(|way| Way { hub: SocketAddr::new(HUB.ip(), 7420), ..way });
        assert_eq!(a_second(HOME, moved), None);
    }
}
