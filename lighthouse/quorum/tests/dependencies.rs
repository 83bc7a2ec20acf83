//! The core stays pure: it depends on `std` and `thiserror` only, and names neither clock, socket,
//! thread nor lock.

#![allow(clippy::unwrap_used)]

use std::path::Path;

const IMPURE: [&str; 9] = [
    "std::fs",
    "std::io",
    "std::net",
    "std::process",
    "std::sync::Mutex",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
    "async ",
];

#[test]
fn the_only_dependency_is_thiserror() {
    let manifest = include_str!("../Cargo.toml");
    let sections = manifest
        .split("\n[")
        .filter_map(|section| section.split_once(']'));
    let dependencies: Vec<_> = sections
        .filter(|(name, _)| name.ends_with("dependencies") && !name.starts_with("dev-"))
        .flat_map(|(_, body)| body.lines())
        .filter_map(|line| line.split(['.', ' ', '=']).next())
        .filter(|name| !name.is_empty())
        .collect();
    assert_eq!(dependencies, ["thiserror"]);
}

#[test]
fn no_module_reaches_for_the_world() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let source = std::fs::read_to_string(&path).unwrap();
        let code = source
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        for line in code {
            let found = IMPURE.iter().find(|name| line.contains(**name));
            assert_eq!(found, None, "{}: {line}", path.display());
        }
    }
}
