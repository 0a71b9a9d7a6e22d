"""How people may say what the sandbox shows: other words for its scenes, colours and sides.

No caption of a clip holds them; the text encoder and the backbone learn from them beside the captions. The
prompts of `tests/benchmarks/backbone.py` are none of them, nor are most of those prompts' new words.
"""

SCENE_PARAPHRASES: dict[str, tuple[str, ...]] = {
    "bouncing_ball": (
        "a {colour} ball is dropped",
        "a {colour} ball falls to the ground and jumps up again",
        "a {colour} rubber ball bouncing",
        "a round {colour} thing falls and rebounds",
        "a {colour} ball plunges down and leaps back up",
        "the {colour} ball keeps bouncing",
    ),
    "striking_ball": (
        "a {colour} ball crashes into a white ball",
        "a {colour} ball bumps into a white one",
        "a {colour} ball knocks a white ball away",
        "two balls collide, one {colour} and one white",
        "a {colour} billiard ball hits another that is white",
        "the {colour} ball pushes the white ball",
    ),
    "pendulum": (
        "a {colour} pendulum sways back and forth",
        "a {colour} weight swings from a string",
        "a {colour} ball hangs on a rod and swings",
        "the pendulum with a {colour} bob oscillates",
        "a {colour} bob is swinging",
        "a clock's {colour} pendulum swings from side to side",
    ),
    "rolling_wheel": (
        "a {colour} wheel goes down a ramp",
        "a {colour} tyre rolls downwards",
        "a {colour} wheel turns as it rolls down a hill",
        "the {colour} wheel is rolling on a ramp",
        "a {colour} wheel speeds up on a slope",
        "something round and {colour} rolls down a hillside",
    ),
    "block_on_spring": (
        "a {colour} block hangs on a spring and oscillates",
        "a {colour} cube goes up and down on a spring",
        "a {colour} box is bobbing on a spring",
        "a spring with a {colour} weight stretches and shrinks",
        "an elastic spring pulls a {colour} block",
        "a {colour} mass vibrates on a coil",
    ),
    "jelly": (
        "a {colour} pudding wobbles",
        "soft {colour} jelly jiggles",
        "a {colour} gelatin cube drops and quivers",
        "a {colour} jelly lands and shakes",
        "a piece of {colour} jelly is shaking",
        "an elastic {colour} lump wobbles on the ground",
    ),
    "pouring_liquid": (
        "{colour} water flows into a tank",
        "a tap pours {colour} water",
        "a {colour} fluid fills a container",
        "{colour} juice is poured into a glass",
        "a container is filled with {colour} liquid",
        "a stream of {colour} liquid comes from a faucet",
    ),
    "smoke": (
        "{colour} smoke is rising",
        "a cloud of {colour} smoke climbs out of a chimney",
        "{colour} gas rises from a pipe",
        "a plume of {colour} smoke goes up",
        "{colour} smoke pours out of a factory",
        "{colour} steam and smoke leave a stack",
    ),
    "press": (
        "a {colour} block is crushed",
        "a {colour} cube is pressed flat",
        "a heavy press deforms a {colour} block",
        "a hydraulic press squashes a {colour} box",
        "a {colour} block gets flattened under a press",
        "something pushes down on a {colour} block until it is flat",
    ),
    "melting_block": (
        "a {colour} ice cube melts",
        "{colour} ice turns into water",
        "a {colour} block of ice becomes a puddle",
        "a {colour} ice cube thaws",
        "{colour} ice is melting in the warmth",
        "a frozen {colour} block melts down",
    ),
    "freezing_tank": (
        "{colour} water freezes",
        "a {colour} liquid becomes solid",
        "{colour} water turns into ice in a tank",
        "ice grows in a tank of {colour} water",
        "a {colour} liquid is freezing over",
        "a container of {colour} fluid solidifies",
    ),
    "boiling_pot": (
        "{colour} water boils",
        "a pot of {colour} soup is boiling",
        "{colour} liquid bubbles over a fire",
        "{colour} water evaporates from a pot",
        "a pan with {colour} liquid is heated until it boils",
        "steam rises from a pot of {colour} water",
    ),
    "condensing_vapor": (
        "{colour} steam condenses",
        "{colour} drops of dew appear on a cold surface",
        "{colour} mist becomes drops and drips",
        "drops of {colour} liquid grow on a cold plate and fall",
        "{colour} vapor cools down and becomes liquid",
        "{colour} water drops collect under a plate",
    ),
    "candle": (
        "a {colour} candle is burning",
        "a {colour} candle with a flickering flame",
        "someone lit a {colour} candle",
        "a small fire burns on a {colour} candle",
        "a {colour} wax candle burns slowly",
        "the {colour} candle gets shorter as it burns",
    ),
    "bomb": (
        "a {colour} bomb detonates",
        "a {colour} explosion",
        "a {colour} bomb bursts into pieces",
        "a {colour} charge explodes",
        "the {colour} bomb is blown apart",
        "a big {colour} blast throws fragments around",
    ),
    "mirror": (
        "a {colour} ray is reflected by a mirror",
        "{colour} light hits a mirror and is thrown back",
        "a {colour} laser beam is reflected",
        "a mirror sends back a {colour} beam",
        "a {colour} ray of light bounces from a mirror",
        "a reflection of {colour} light",
    ),
    "glass_block": (
        "a {colour} ray bends as it enters glass",
        "{colour} light passes through a block of glass and changes direction",
        "glass refracts a {colour} beam",
        "the refraction of a {colour} laser in glass",
        "a {colour} light ray goes through glass",
        "a {colour} beam is bent by a prism of glass",
    ),
    "foggy_beam": (
        "a {colour} beam shines into fog",
        "{colour} light is scattered by fog",
        "a {colour} laser in thick fog spreads out",
        "a {colour} beam fades in a cloud",
        "fog makes a {colour} light beam spread",
        "{colour} rays get lost in a haze",
    ),
    "two_slits": (
        "{colour} light passes through two slits and makes stripes",
        "an interference pattern of {colour} light",
        "{colour} waves interfere behind two slits",
        "bands of {colour} light behind two narrow openings",
        "two slits diffract {colour} light",
        "the two slit experiment with {colour} light",
    ),
    "lamp": (
        "a {colour} lamp is turned on",
        "a {colour} light goes on",
        "a lamp glows {colour}",
        "a {colour} lantern starts to shine",
        "the {colour} lamp brightens the room",
        "a {colour} bulb is switched on",
    ),
}
"""Other sentences for each scene by its name, each with the field `{colour}`."""

COLOUR_SYNONYMS: dict[str, tuple[str, ...]] = {
    "red": ("bright red", "dark red", "ruby", "cherry red", "blood red", "rose red"),
    "yellow": ("bright yellow", "light yellow", "gold", "amber", "sunny yellow", "canary yellow"),
    "green": ("bright green", "dark green", "olive", "grass green", "mint", "jade"),
    "turquoise": ("aqua", "aquamarine", "bright turquoise", "blue-green", "greenish blue", "sea green"),
    "blue": ("bright blue", "dark blue", "navy", "sky blue", "cobalt", "sapphire"),
    "purple": ("bright purple", "dark purple", "lilac", "mauve", "lavender", "plum"),
}
"""Other words for each colour that a caption names."""

SIDE_PHRASES: dict[str, tuple[str, ...]] = {
    side: (
        f"on the {side} side",
        f"at the {side}",
        f"to the {side}",
        f"in the {side} half",
        f"on the {side} hand side",
    )
    for side in ("left", "right")
}
"""Other phrases for the sides, as captions say `on the left`."""
