//! Every situation in `testdata/*.txt` comes out as written there.
//!
//! A transcript is a comment that tells the situation, then blocks of commands, each with what
//! came of it below a `----`. To add one: write the commands, run `UPDATE=1 cargo test -p
//! torchft-quorum --test transcripts`, read every line of the diff, commit.

#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use transcript::{Command, World};

mod transcript;

const RULER: &str = "----";

#[test]
fn every_transcript_comes_out_as_written() {
    let update = std::env::var_os("UPDATE").is_some();
    let mut wrong = String::new();
    for path in transcripts() {
        let written = std::fs::read_to_string(&path).unwrap();
        let found = replay(&written);
        if update {
            std::fs::write(&path, found).unwrap();
        } else if let Some(difference) = first_difference(&written, &found) {
            writeln!(wrong, "{}{difference}\n", path.display()).unwrap();
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

fn transcripts() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/testdata");
    let entries = std::fs::read_dir(folder).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty());
    paths
}

/// The same transcript with what came of it now.
fn replay(written: &str) -> String {
    let mut world = World::default();
    let blocks = written
        .split("\n\n")
        .map(str::trim)
        .filter(|b| !b.is_empty());
    let blocks: Vec<_> = blocks
        .map(|block| replay_block(block, &mut world))
        .collect();
    blocks.join("\n\n") + "\n"
}

fn replay_block(block: &str, world: &mut World) -> String {
    let (commands, _) = block.split_once(RULER).unwrap_or((block, ""));
    let mut found = String::from(commands.trim_end());
    let is_command = |line: &&str| !line.starts_with('#') && !line.is_empty();
    let mut lines = commands.lines().filter(is_command).peekable();
    if lines.peek().is_some() {
        write!(found, "\n{RULER}").unwrap();
    }
    for line in lines {
        for outcome in world.run(&Command::parse(line)) {
            write!(found, "\n{outcome}").unwrap();
        }
    }
    found
}

fn first_difference(written: &str, found: &str) -> Option<String> {
    let mut pairs = written.lines().zip(found.lines()).enumerate();
    if let Some((i, (was, is))) = pairs.find(|(_, (was, is))| was != is) {
        return Some(format!(":{}\n  written: {was}\n  found:   {is}", i + 1));
    }
    let (was, is) = (written.lines().count(), found.lines().count());
    (was != is).then(|| format!(": {was} lines written, {is} found"))
}
