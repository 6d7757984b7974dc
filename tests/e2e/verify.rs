//! What people compare is the same on both sides, and stands for one agent only.

use std::sync::Arc;

use connect_tests::{
    client::Keys,
    home::{Home, Workspace},
    hub::Hub,
    lies::{Help, Lie, LyingHub},
};
use serde_json::Value;

fn id_of(home: &Home, label: &str) -> String {
    let agents = home.json(&["agents"]);
    let agents = agents.as_array().expect("a list");
    let agent = agents.iter().find(|agent| agent["label"] == label).expect("listed");
    agent["agent_id"].as_str().expect("an id").to_owned()
}

#[test]
fn both_sides_see_the_same_words_and_digits() {
    let workspace = Workspace::found(Hub::shared());
    let founder = &workspace.founder;
    let (one, other) = (workspace.join("one"), workspace.join("other"));
    let words = founder.ok(&["verify"]);
    assert_eq!(words.split(' ').count(), 8);
    assert_eq!(one.ok(&["verify"]), words);
    assert_ne!(Workspace::found(Hub::shared()).founder.ok(&["verify"]), words);

    let digits = one.ok(&["verify", "other"]);
    let groups: Vec<_> = digits.split(' ').collect();
    assert_eq!(groups.len(), 12);
    assert!(groups.iter().all(|group| group.len() == 5 && group.parse::<u32>().is_ok()));
    assert_eq!(other.ok(&["verify", "one"]), digits);
    assert_eq!(other.ok(&["verify", &id_of(founder, "one")]), digits);
    assert_ne!(founder.ok(&["verify", "one"]), digits);

    let json = one.json(&["verify", "other"]);
    assert_eq!(json["workspace_words"], words.as_str());
    assert_eq!(json["agent_id"], id_of(founder, "other").as_str());
    assert_eq!(json["digits"], digits.replace(' ', "").as_str());
    assert_eq!(one.json(&["verify"])["digits"], Value::Null);

    // A new static key is the same agent.
    other.ok(&["rotate"]);
    assert_eq!(one.ok(&["verify", "other"]), digits);
}

#[test]
fn label_of_two_agents_is_refused() {
    let workspace = Workspace::found(Hub::shared());
    let founder = &workspace.founder;
    let (_one, _other) = (workspace.join("web"), workspace.join("web"));
    founder.fails(&["verify", "web"], 2, "2 agents are called `web`");
    let ids = [id_of(founder, "web"), id_of(founder, "web-2")];
    let digits = ids.each_ref().map(|id| founder.ok(&["verify", id]));
    assert_ne!(digits[0], digits[1]);
    // The number that tells listed labels apart names nobody, for it changes; the id is told instead.
    founder.fails(&["verify", "web-2"], 2, &format!("name it by its id: {}", ids[1]));
    assert_eq!(founder.ok(&["verify", &ids[1][..8]]), digits[1], "as much as people are shown");
    founder.fails(&["verify", &ids[1][..7]], 2, "no agent");
    founder.fails(&["verify", "nobody"], 2, "no agent");
    founder.fails(&["verify", "founder"], 2, "this agent itself");
    Home::new().fails(&["verify"], 3, "");
}

#[test]
fn man_in_the_middle_changes_the_digits_or_is_not_listed_at_all() {
    let hub = LyingHub::before(Hub::shared());
    let workspace = Workspace::found_at(&hub.url());
    let (one, other) = (workspace.join("one"), workspace.join("other"));
    let friend = workspace.join("friend");
    let digits = one.ok(&["verify", "other"]);
    let id = id_of(&one, "other");

    // The hub shows its friend under the label that the friend copied: a member, but not the right one.
    let accomplice = Some(Arc::new(Keys::of(&friend)));
    let help = || Help { accomplice: accomplice.clone(), ..Help::default() };
    hub.tell(Lie::ManInTheMiddle, help());
    let in_the_middle = one.ok(&["verify", "other"]);
    assert_ne!(in_the_middle, digits, "people who compare see it");
    hub.be_honest();
    assert_eq!(other.ok(&["verify", "one"]), digits, "what the other side reads out");
    assert_eq!(one.ok(&["verify", "friend"]), in_the_middle);

    // Under the right id it is nobody: an id is a hash of the key that is certified.
    hub.tell(Lie::ManInTheMiddle, help());
    one.ok(&["agents"]);
    let outcome = one.run(&["verify", &id]);
    assert_eq!(outcome.code, Some(2), "{}", outcome.stdout);
    assert!(outcome.stderr.contains("event=\"left_out\""), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("no agent is called"), "{}", outcome.stderr);

    // An agent that the hub made up is not listed: its certificate is not by a signer.
    hub.tell(Lie::ForgedAgent, help());
    let outcome = one.run(&["--json", "agents"]);
    assert_eq!(outcome.stdout.matches("agent_id").count(), 4, "{}", outcome.stdout);
    let told = hub.reports().pop().expect("the lie was told").detail;
    let made_up = told.trim_start_matches("agent ").split(',').next().expect("an id").to_owned();
    assert!(!outcome.stdout.contains(&made_up) && outcome.stderr.contains("issuer is unknown"));
    one.fails(&["verify", &made_up], 2, "no agent is called");
    assert_eq!(one.ok(&["verify", &id]), digits);
}
