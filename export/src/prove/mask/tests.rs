use super::*;
use crate::prove::{
    mask::bias::{ScoreBias, ScorePlaces},
    refusal::Unread,
};

fn made(
    allowed: impl Fn(CallShape, usize, usize, usize) -> f64,
) -> impl Fn(CallShape, ScorePlaces) -> Result<ScoreBias, Unread> {
    move |z, places| {
        let mut data = Vec::new();
        for b in 0..z.b {
            for _ in 0..2 {
                data.extend(places.each(z.total()).map(|[i, j]| allowed(z, b, z.past + i, j)));
            }
        }
        Ok(ScoreBias {
            data,
            heads: 2,
            places,
            gain: None,
        })
    }
}

fn hide(seen: bool) -> f64 {
    if seen { 0.0 } else { f64::NEG_INFINITY }
}

#[test]
fn causal_sliding_and_padded_masks_are_told_apart() {
    let causal = made(|_, _, i, j| hide(j <= i));
    assert_eq!(
        classify(&causal, &[], &[]),
        Ok(SupportedMask {
            window: None,
            padding: false
        })
    );
    let padded = made(|z, b, i, j| hide(j <= i && j >= z.first(b)));
    assert_eq!(
        classify(&padded, &[128], &[]),
        Ok(SupportedMask {
            window: None,
            padding: true
        })
    );
    for w in [3usize, 128, 4096] {
        let sliding = made(move |z, b, i, j| hide(j <= i && i - j < w && j >= z.first(b)));
        let found = classify(&sliding, &[w], &[]);
        assert_eq!(
            found,
            Ok(SupportedMask {
                window: Some(w),
                padding: true
            }),
            "{w}"
        );
        // Written as j > i - w or as i - j <= w - 1.
        assert_eq!(classify(&sliding, &[w - 1], &[]), found);
    }
}

#[test]
fn other_masks_are_named_with_what_failed() {
    let why = |bias: ReadBias, c: &[usize]| classify(bias, c, &[]).unwrap_err().to_string();
    let both_ways = made(|_, _, _, _| 0.0);
    assert!(why(&both_ways, &[]).contains("token 0 sees token 1"));
    let prefix = made(|_, _, i, j| hide(j <= i || j < 2));
    assert!(why(&prefix, &[]).contains("not causal"));
    let alibi = made(|_, _, i, j| {
        if j <= i {
            -0.5 * (i - j) as f64
        } else {
            f64::NEG_INFINITY
        }
    });
    assert!(why(&alibi, &[]).contains("ALiBi"));
    let chunked = made(|_, _, i, j| hide(j <= i && i / 64 == j / 64));
    assert!(why(&chunked, &[64]).contains("neither causal nor a sliding window"));
    let dilated = made(|_, _, i, j| hide(j <= i && (i - j) % 2 == 0));
    assert!(why(&dilated, &[]).contains("does not see token"));
}

#[test]
fn a_window_that_nothing_mentions_is_read_from_a_far_row() {
    let sliding = made(|_, _, i, j| hide(j <= i && i - j < 100));
    for (constants, far) in [(&[200][..], &[][..]), (&[], &[64, 256])] {
        assert_eq!(
            classify(&sliding, constants, far),
            Ok(SupportedMask {
                window: Some(100),
                padding: false
            })
        );
    }
}

#[test]
fn what_looks_like_a_window_from_one_place_only_is_refused() {
    let why = |bias: ReadBias| classify(bias, &[], &[64, 256]).unwrap_err().to_string();
    let chunked = made(|_, _, i, j| hide(j <= i && i / 100 == j / 100));
    assert!(why(&chunked).contains("neither causal nor a sliding window"));
    // Wider from 200 tokens on.
    let changing = made(|_, _, i, j| hide(j <= i && i - j < if i < 200 { 60 } else { 90 }));
    assert!(why(&changing).contains("neither causal nor a sliding window"));
}

/// What is not a window is refused although no constant says where it begins.
#[test]
fn masks_are_told_by_their_far_rows() {
    let far = [64, 256, 1024, 4096, 9001];
    let refused = |allowed: fn(usize, usize) -> bool, says: &str| {
        let bias = made(move |_, _, i, j| hide(allowed(i, j)));
        let why = classify(&bias, &[], &far).expect_err(says).to_string();
        assert!(why.contains(says), "{why}");
    };
    refused(
        |i, j| j <= i && (i - j < 4096 || j < 4),
        "the last 4096 tokens it sees the first 4",
    );
    refused(
        |i, j| j <= i && (i - j < 5000 || j == 0),
        "the first 1 (attention sinks in the mask)",
    );
    refused(
        |i, j| j <= i && i / 4900 == j / 4900,
        "neither causal nor a sliding window",
    );
    refused(
        |i, j| j <= i && (i - j < 3000 || j % 2 == 0),
        "neither causal nor a sliding window",
    );
    refused(|i, j| j <= i && j != 4097, "does not see token 4097");
    refused(
        |i, j| j <= i && (i < 7000 || i - j < 3000),
        "neither causal nor a sliding window",
    );
    // Tokens that see each other both ways, and one token alone that sees less: no single token's row shows them.
    refused(
        |i, j| j <= i || i / 100 == 60 && j / 100 == 60,
        "token 6000 sees token 6001",
    );
    refused(
        |i, j| j <= i && (i != 5003 || i - j < 10),
        "token 5003 does not see token 0",
    );
    let window = made(|_, _, i, j| hide(j <= i && i - j < 4900));
    let found = classify(&window, &[], &far).map(|m| m.window);
    assert_eq!(found, Ok(Some(4900)));
}

#[test]
fn what_shows_only_in_the_last_rows_that_a_model_takes_is_found() {
    let sinks = made(|_, _, i, j| hide(j <= i && (i - j < 3900 || j < 4)));
    let limited = |z: CallShape, places: ScorePlaces| match z.total() {
        0..=4000 => sinks(z, places),
        _ => Err(Unread::Beyond),
    };
    let why = classify(&limited, &[], &[64, 256, 1024, 4096])
        .expect_err("sinks")
        .to_string();
    assert!(why.contains("the first 4 (attention sinks in the mask)"), "{why}");
}

#[test]
fn numbers_are_looked_at_well_behind_them() {
    let sinks = made(|_, _, i, j| hide(j <= i && (i - j < 700 || j < 4)));
    let why = classify(&sinks, &[700], &[]).expect_err("sinks").to_string();
    assert!(why.contains("the last 700 tokens it sees the first 4"), "{why}");
    // One row of the many.
    let once = made(|_, _, i, j| hide(j <= i && (i != 1400 || i - j < 30)));
    assert!(classify(&once, &[700], &[]).is_err(), "twice the number");
}

#[test]
fn padding_is_read_from_afar_too() {
    // Of a padded sequence the first valid tokens are sinks.
    let sinks = made(|z, b, i, j| {
        let first = z.first(b);
        hide(j <= i && j >= first && (first == 0 || i - j < 2000 || j < first + 4))
    });
    let why = classify(&sinks, &[], &[64, 4096])
        .expect_err("sinks of padded sequences")
        .to_string();
    assert!(why.contains("with padding on the left"), "{why}");
}

#[test]
fn far_calls_that_the_model_does_not_take_are_left_out() {
    let causal = made(|_, _, i, j| hide(j <= i));
    let limited = |z: CallShape, places: ScorePlaces| match z.total() {
        0..=128 => causal(z, places),
        _ => Err(Unread::Beyond),
    };
    assert!(classify(&limited, &[], &[64, 256]).is_ok_and(|m| m.window.is_none()));
    let broken = |z: CallShape, places: ScorePlaces| match z.total() {
        0..=128 => causal(z, places),
        _ => Err(Unread::Shape {
            name: "masked".to_owned(),
            shape: vec![1, 8],
        }),
    };
    assert!(
        classify(&broken, &[], &[64, 256])
            .unwrap_err()
            .to_string()
            .contains("at 1 token(s) after 256")
    );
}

#[test]
fn factors_that_depend_on_positions_are_refused() {
    let causal = made(|_, _, i, j| hide(j <= i));
    let hotter = |z: CallShape, places: ScorePlaces| {
        let gain = if z.past < 100 { 0.25 } else { 0.5 };
        let gain = Some([gain, gain]);
        causal(z, places).map(|b| ScoreBias { gain, ..b })
    };
    assert!(classify(&hotter, &[], &[64]).is_ok());
    let why = classify(&hotter, &[], &[64, 256]).unwrap_err().to_string();
    assert!(why.contains("with 0.5 where others are with 0.25"), "{why}");
}

/// Only sizes that don't fit excuse a call that continues a past; what the evaluator can't compute does not.
#[test]
fn calls_that_continue_a_past_are_left_out_for_their_sizes_alone() {
    let past_fails = |why: crate::eval::Error| {
        let causal = made(|_, _, i, j| hide(j <= i));
        let read = |z: CallShape, places: ScorePlaces| {
            if z.continues() {
                Err(Unread::from(why.clone()))
            } else {
                causal(z, places)
            }
        };
        classify(&read, &[], &[])
    };
    let sizes = crate::eval::Error::Reshape {
        from: vec![4, 9],
        into: vec![4, 4],
    };
    assert!(past_fails(sizes).is_ok());
    let unsupported = crate::eval::Error::NotSupported {
        domain: "com.example".to_owned(),
        op_type: "Mystery".to_owned(),
    };
    let why = past_fails(unsupported).unwrap_err().to_string();
    assert!(why.contains("com.example::Mystery is not supported"), "{why}");
}
