//! What people compare is the same on both sides, and stands for one agent only.

use connect_tests::{
    home::{Home, Workspace},
    hub::Hub,
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
    // The number that tells listed labels apart names nobody.
    founder.fails(&["verify", "web-2"], 2, "no agent");
    founder.fails(&["verify", "nobody"], 2, "no agent");
    founder.fails(&["verify", "founder"], 2, "this agent itself");
    Home::new().fails(&["verify"], 3, "");
}
