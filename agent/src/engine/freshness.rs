//! How old the news of the trust log is: told from the beats of witnesses, never from wall clocks.
//!
//! Each witness stamps its beats with its own clock. The smallest difference ever seen between the
//! reader's monotonic clock and that stamp is taken for no delay at all; what a beat is later than
//! that, it is old. So clocks may be wrong by any amount, as long as they run. PROTOCOL.md, "Beats".

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use connect_spec::{ids::AgentId, objects::UnixTime};

/// Witnesses that are remembered: more than the hub shows at a time.
const MAX_WITNESSES: usize = 64;

#[derive(Debug, Clone, Copy)]
struct Witness {
    /// The stamp of its newest beat.
    newest: UnixTime,
    /// The smallest `read - stamp` seen, in seconds; stamps may lie ahead.
    least_delay: i128,
}

/// What the beats of all witnesses say.
#[derive(Debug)]
pub(crate) struct Freshness {
    begin: Instant,
    witnesses: BTreeMap<AgentId, Witness>,
}

impl Freshness {
    pub(crate) fn new(now: Instant) -> Self {
        Self { begin: now, witnesses: BTreeMap::new() }
    }

    fn seconds(&self, now: Instant) -> i128 {
        now.saturating_duration_since(self.begin).as_secs().into()
    }

    /// Takes the beat of a verified witness whose head the own log contains.
    pub(crate) fn handle_beat(&mut self, now: Instant, witness: AgentId, stamp: UnixTime) {
        let delay = self.seconds(now) - i128::from(stamp);
        if let Some(known) = self.witnesses.get_mut(&witness) {
            if stamp > known.newest {
                known.newest = stamp;
                known.least_delay = known.least_delay.min(delay);
            }
        } else if self.witnesses.len() < MAX_WITNESSES {
            self.witnesses.insert(witness, Witness { newest: stamp, least_delay: delay });
        }
    }

    /// Forgets a witness, as when it was revoked.
    pub(crate) fn retain(&mut self, keep: impl Fn(&AgentId) -> bool) {
        self.witnesses.retain(|witness, _| keep(witness));
    }

    /// The age of the newest beat of anybody but `peer`; `None` without any.
    pub(crate) fn age(&self, now: Instant, peer: Option<&AgentId>) -> Option<Duration> {
        let now = self.seconds(now);
        self.witnesses
            .iter()
            .filter(|(witness, _)| Some(*witness) != peer)
            .map(|(_, witness)| now - i128::from(witness.newest) - witness.least_delay)
            .min()
            .map(|age| Duration::from_secs(u64::try_from(age).unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANNA: AgentId = AgentId([1; 16]);
    const BERT: AgentId = AgentId([2; 16]);

    fn after(begin: Instant, seconds: u64) -> Instant {
        begin + Duration::from_secs(seconds)
    }

    #[test]
    fn age_grows_while_nobody_beats_and_clocks_may_be_wrong() {
        for clock_error in [-86_400, 0, 86_400] {
            let begin = Instant::now();
            let mut fresh = Freshness::new(begin);
            let stamp = |at: u64| UnixTime::try_from(1_700_000_000 + clock_error).unwrap() + at;
            assert_eq!(fresh.age(begin, None), None);
            fresh.handle_beat(begin, ANNA, stamp(0));
            assert_eq!(fresh.age(begin, None), Some(Duration::ZERO));
            fresh.handle_beat(after(begin, 600), ANNA, stamp(600));
            assert_eq!(fresh.age(after(begin, 700), None), Some(Duration::from_secs(100)));
            assert_eq!(fresh.age(after(begin, 4300), None), Some(Duration::from_secs(3700)));
        }
    }

    #[test]
    fn a_hub_that_holds_beats_back_or_repeats_them_does_not_make_them_young() {
        let begin = Instant::now();
        let mut fresh = Freshness::new(begin);
        fresh.handle_beat(begin, ANNA, 1000);
        fresh.handle_beat(after(begin, 600), ANNA, 1600);
        // Held back for an hour: as old as it is.
        fresh.handle_beat(after(begin, 4800), ANNA, 2200);
        assert_eq!(fresh.age(after(begin, 4800), None), Some(Duration::from_secs(3600)));
        // Shown again, or an older one.
        fresh.handle_beat(after(begin, 5000), ANNA, 2200);
        fresh.handle_beat(after(begin, 5000), ANNA, 1000);
        assert_eq!(fresh.age(after(begin, 5000), None), Some(Duration::from_secs(3800)));
    }

    #[test]
    fn a_peer_is_no_witness_for_itself() {
        let begin = Instant::now();
        let mut fresh = Freshness::new(begin);
        fresh.handle_beat(begin, ANNA, 1000);
        fresh.handle_beat(after(begin, 900), BERT, 7);
        assert_eq!(fresh.age(after(begin, 1000), Some(&BERT)), Some(Duration::from_secs(1000)));
        assert_eq!(fresh.age(after(begin, 1000), None), Some(Duration::from_secs(100)));
        fresh.retain(|witness| *witness == BERT);
        assert_eq!(fresh.age(after(begin, 1000), Some(&BERT)), None);
    }

    #[test]
    fn only_so_many_witnesses_are_remembered() {
        let begin = Instant::now();
        let mut fresh = Freshness::new(begin);
        for number in 0..=u8::MAX {
            fresh.handle_beat(begin, AgentId([number; 16]), 1);
        }
        assert_eq!(fresh.witnesses.len(), MAX_WITNESSES);
    }
}
