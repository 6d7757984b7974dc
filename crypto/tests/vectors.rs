//! The committed vectors are what this implementation says, byte for byte.

mod common;
#[path = "../examples/vectors/generate.rs"]
mod generate;

#[test]
fn vectors_are_up_to_date() {
    for (name, expected) in generate::files() {
        let found = std::fs::read_to_string(generate::directory().join(&name)).unwrap();
        let differs = found.lines().zip(expected.lines()).position(|(left, right)| left != right);
        assert!(
            found == expected,
            "{name} differs, first in line {}: if the protocol was meant to change, run \
             `cargo run -p connect-crypto --example vectors` and say so in PROTOCOL.md",
            differs.map_or(0, |line| line + 1)
        );
    }
}

#[test]
fn every_file_beside_the_vectors_is_one() {
    let mut expected: Vec<_> = generate::files().into_iter().map(|(name, _)| name).collect();
    expected.push("README.md".to_owned());
    expected.sort();
    let mut found: Vec<_> = std::fs::read_dir(generate::directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, expected);
}

#[test]
fn most_cases_must_fail() {
    let (mut valid, mut invalid) = (0, 0);
    for (_, text) in generate::files() {
        let file: serde_json::Value = serde_json::from_str(&text).unwrap();
        for case in file["cases"].as_array().unwrap() {
            match case["valid"].as_bool().unwrap() {
                true => valid += 1,
                false => {
                    assert!(!case["reason"].as_str().unwrap().is_empty());
                    invalid += 1;
                }
            }
        }
    }
    assert!(invalid > 2 * valid, "{valid} valid, {invalid} invalid");
}
