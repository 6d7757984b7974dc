//! The beats of witnesses: what each says last of the trust log's head.
//!
//! In memory only. The hub cannot make one, and one that it withholds or that is old is noticed by the
//! agents, who judge how fresh they are.

use std::collections::{BTreeMap, VecDeque};

use connect_spec::{
    bytes::Blob,
    ids::{AgentId, WorkspaceId},
    limits::MAX_BEATS,
    objects::UnixTime,
};

use crate::limits::MAX_WITNESSES;

#[derive(Debug)]
struct Kept {
    agent: AgentId,
    time: UnixTime,
    beat: Blob,
}

/// The newest beat of each witness, by workspace.
#[derive(Debug, Default)]
pub struct Beats {
    /// The last one that came is first.
    workspaces: BTreeMap<WorkspaceId, VecDeque<Kept>>,
}

impl Beats {
    /// Keeps a beat, verified, in place of an older one of the same agent.
    pub fn keep(&mut self, workspace: WorkspaceId, agent: AgentId, time: UnixTime, beat: Blob) {
        let beats = self.workspaces.entry(workspace).or_default();
        if let Some(index) = beats.iter().position(|kept| kept.agent == agent) {
            if beats[index].time > time {
                return;
            }
            beats.remove(index);
        }
        beats.push_front(Kept { agent, time, beat });
        beats.truncate(MAX_WITNESSES);
    }

    /// The newest beats of all agents but one.
    #[must_use]
    pub fn of_others(&self, workspace: WorkspaceId, agent: AgentId) -> Vec<(AgentId, Blob)> {
        self.workspaces
            .get(&workspace)
            .into_iter()
            .flatten()
            .filter(|kept| kept.agent != agent)
            .take(MAX_BEATS)
            .map(|kept| (kept.agent, kept.beat.clone()))
            .collect()
    }

    /// Forgets the beats of a workspace.
    pub fn forget(&mut self, workspace: WorkspaceId) {
        self.workspaces.remove(&workspace);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKSPACE: WorkspaceId = WorkspaceId([1; 32]);

    fn agent(number: usize) -> AgentId {
        AgentId([u8::try_from(number).unwrap(); 16])
    }

    #[test]
    fn the_newest_beats_of_a_few_witnesses_are_kept() {
        let mut beats = Beats::default();
        for number in 0..=MAX_WITNESSES {
            beats.keep(WORKSPACE, agent(number), 7, vec![0].into());
        }
        assert_eq!(beats.workspaces[&WORKSPACE].len(), MAX_WITNESSES);
        assert_eq!(beats.of_others(WORKSPACE, agent(200)).len(), MAX_BEATS);

        // One that was left before another of the same agent, and came after it, is dropped.
        beats.keep(WORKSPACE, agent(1), 9, vec![1].into());
        beats.keep(WORKSPACE, agent(1), 8, vec![2].into());
        assert_eq!(beats.of_others(WORKSPACE, agent(200))[0], (agent(1), vec![1].into()));
        assert_eq!(beats.of_others(WORKSPACE, agent(1))[0].1, vec![0].into());
        assert_eq!(beats.of_others(WorkspaceId([2; 32]), agent(1)), []);
        beats.forget(WORKSPACE);
        assert_eq!(beats.of_others(WORKSPACE, agent(200)), []);
    }
}
