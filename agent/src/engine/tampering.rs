//! When packets that do not open are more than an accident.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use connect_spec::ids::{AgentId, ServiceId};

/// So many altered packets of one conversation within [`WINDOW`] are reported. TCP and TLS let no
/// accident through, but a single one may still be a broken machine.
const ALARMING: usize = 5;
/// How long an altered packet counts.
const WINDOW: Duration = Duration::from_secs(60);

/// The packets that did not open, for each peer and service.
///
/// Each of them ended its tunnel, so tunnels bound how many there can be: what is older than a minute is
/// forgotten whenever another one comes.
#[derive(Debug, Default)]
pub(crate) struct Tampering {
    seen: BTreeMap<(AgentId, ServiceId), VecDeque<Instant>>,
}

impl Tampering {
    /// Counts a packet that did not open; `true` when that is to be reported. Then counting starts over.
    pub(crate) fn note(&mut self, peer: AgentId, service: ServiceId, now: Instant) -> bool {
        self.seen.retain(|_, times| {
            times.retain(|time| now.duration_since(*time) < WINDOW);
            !times.is_empty()
        });
        let times = self.seen.entry((peer, service)).or_default();
        times.push_back(now);
        let alarming = times.len() >= ALARMING;
        if alarming {
            self.seen.remove(&(peer, service));
        }
        alarming
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: AgentId = AgentId([1; 16]);
    const SERVICE: ServiceId = ServiceId([2; 16]);

    #[test]
    fn fifth_within_a_minute_is_reported_and_so_is_the_tenth() {
        let mut tampering = Tampering::default();
        let start = Instant::now();
        let reported: Vec<_> = (0..12)
            .filter(|n| tampering.note(PEER, SERVICE, start + Duration::from_secs(10) * *n))
            .collect();
        assert_eq!(reported, [4, 9]);
    }

    #[test]
    fn altered_packets_that_are_far_apart_are_not_reported() {
        let mut tampering = Tampering::default();
        let start = Instant::now();
        // The first of any five is a minute old when the fifth comes.
        for n in 0..100 {
            assert!(!tampering.note(PEER, SERVICE, start + WINDOW / 4 * n));
        }
    }

    #[test]
    fn peers_and_services_are_counted_apart_and_forgotten() {
        let mut tampering = Tampering::default();
        let now = Instant::now();
        for _ in 1..ALARMING {
            for other in 0..4 {
                assert!(!tampering.note(AgentId([other; 16]), SERVICE, now));
                assert!(!tampering.note(PEER, ServiceId([other + 10; 16]), now));
            }
        }
        assert!(!tampering.note(PEER, ServiceId([99; 16]), now + WINDOW));
        assert_eq!(tampering.seen.len(), 1);
    }
}
