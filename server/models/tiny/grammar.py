"""Rules and templates of the training questions (see :mod:`server.models.tiny.language` for the notation)."""

from __future__ import annotations

from server.models.tiny.templates_detail import ATCODE, CODE, MULTI, OBJECT, REV
from server.models.tiny.templates_shot import COUNT, EXIST, ORDER, TIME

RULES: dict[str, tuple[str, ...]] = {
    "the": ("the", "the", "the", "the", "the", "that", "this", ""),
    "label": (
        "label|label|label|label|label",
        "tag|sign|plate|sticker",
        "tag|sign|plate|sticker|card|badge|placard|panel|marker|banner|strip|box|caption|nameplate|board|tile",
    ),
    "code": (
        "code|code|code|code",
        "code|text|characters|string",
        "code|text|characters|string|letters|writing|sequence|symbols|inscription|three characters|combination|id"
        "|letters and digits|three character code|short code|identifier|serial|reading|password|value|label code",
    ),
    "video": ("video", "video", "clip", "recording", "footage", "film", "movie", "sequence", "tape", "whole video"),
    "in": ("in", "in", "in", "during", "throughout", "within", "across", "over"),
    "invideo": ("$in (the|the|this|) $video",),
    "maybevideo": ("", "", "", "$invideo", "$invideo", "(anywhere|at any point|ever|at all)"),
    "thing": ("object", "object", "item", "shape", "thing", "figure", "object", "symbol", "element", "form", "icon"),
    "show": (
        "appear|show up|occur",
        "appear|show up|turn up|come up|come into view|pop up|emerge|come on|arrive|come in|come on screen|enter",
    ),
    "shows": (
        "appears|shows up|occurs",
        "appears|shows up|turns up|comes up|comes into view|pops up|emerges|comes on|arrives|comes in|enters"
        "|comes on screen|is shown|is visible|is seen|is on screen|can be seen|is displayed|becomes visible",
    ),
    "seen": ("visible", "shown", "seen", "displayed", "on screen", "in view", "present", "on display", "presented"),
    "first": ("first", "first", "for the first time", "initially", ""),
    "earlier": ("first", "first", "earlier", "sooner", "before the other", "before", "earliest", "ahead"),
    "time": (
        "time|time|moment|point",
        "time|timestamp|moment|point|second|time code|point in time|position|minute and second|instant|stage|mark",
    ),
    "is": ("is", "is", "is", "was", "s"),
    "are": ("are", "are", "were"),
    "does": ("does", "does", "did"),
    "get": (
        "read|read out|give me|tell me|report|state|name",
        "read|give me|tell me|find|identify|report|state|name|write down|transcribe|type out|spell out|extract"
        "|provide|return|look up|say|output|list|get|write|recite|quote|retrieve|share|print|copy|check|show me",
    ),
    "say": (
        "show|say|read|have",
        "show|say|read|display|have|carry|bear|contain|hold|present|feature|spell|state|indicate|give|hold",
    ),
    "written": ("written", "printed", "shown", "displayed", "visible", "seen", "found", "on display", "marked"),
    "with": (
        "of",
        "of",
        "of",
        "next to|near|by|beside|with|for|belonging to|accompanying|that goes with|attached to|around|from|alongside"
        "|that belongs to|shown with|displayed with|that comes with|associated with|on|that accompanies|paired with",
    ),
    "while": ("when|while|as|during the time|at the moment", "when|while|whenever|as|once|where"),
    # The plate: place and colour, colour alone, or place alone.
    "upper1": (
        "{p1_upper}",
        "{p1_upper}",
        "{p1_top}",
        "{p1_top}",
        "{p1_higher}",
        "{p1_uppermost}",
        "{p1_topmost}",
    ),
    "colored": ("", "", "", "colored", "coloured", "color"),
    "named_full1": (
        "$upper1 {lab1} $label",
        "$upper1 {lab1} $label",
        "$upper1 {lab1} $label",
        "{lab1} $upper1 $label",
        "$upper1 $label (that is|which is|colored|in|that s|in color) {lab1}",
        "{lab1} $label (at|on|in) (the|) {p1_top}",
        "{lab1} $label (at|on|near) (the|) {p1_top} of the (screen|frame|picture|image|scene)",
        "$upper1 {lab1} colored $label",
        "$label in {lab1} (at|on) (the|) {p1_top}",
        "$upper1 (and|) {lab1} $label",
        "{lab1} (one|$label) (that is|) {p1_top}",
    ),
    "named_color1": (
        "{lab1} $label",
        "{lab1} $label",
        "{lab1} $colored $label",
        "$label (that is|which is|colored|in) {lab1}",
        "$label in {lab1}",
    ),
    "named_place1": (
        "$upper1 $label",
        "$upper1 $label",
        "$upper1 $label",
        "$label (at|on|in) (the|) {p1_top}",
        "$label (at|on|near) (the|) {p1_top} of the (screen|frame|picture|image|scene)",
    ),
    "of_full1": (
        "the $named_full1 $with $the {obj1}",
        "the $named_full1 $with $the {obj1}",
        "the $named_full1 $with $the {obj1}",
        "the {obj1} s $named_full1",
        "the {obj1} s $named_full1",
        "the $named_full1 $while the {obj1} $shows",
        "{lab1} $label ({p1_above}|{p1_over}|{p1_above}) the {obj1}",
        "the {lab1} $label {p1_above} $the {obj1}",
        "the $named_full1 in the (scene|shot|part) with the {obj1}",
    ),
    "of_color1": (
        "the $named_color1 $with $the {obj1}",
        "the $named_color1 $with $the {obj1}",
        "the {obj1} s $named_color1",
        "the $named_color1 $while the {obj1} $shows",
        "the $named_color1 in the (scene|shot|part) with the {obj1}",
    ),
    "of_place1": (
        "the $named_place1 $with $the {obj1}",
        "the $named_place1 $with $the {obj1}",
        "the {obj1} s $named_place1",
        "the $named_place1 $while the {obj1} $shows",
        "the $label ({p1_above}|{p1_over}) $the {obj1}",
        "the $named_place1 in the (scene|shot|part) with the {obj1}",
    ),
}

DESCRIBE = (
    "(describe|summarize|summarise|outline|explain|recap) (the|this|) $video",
    "what is (the|this) $video about",
    "what (happens|is happening|goes on|is shown|can be seen|do you see|is there) $invideo",
    "(give me|write|make) a (summary|description|short summary|short description|overview)",
    "(tell me|say something) about (the|this) $video",
    "summary",
    "(what|which) objects (are|do) (shown|there|appear|you see) $invideo",
    "what do you see",
    "(list|name) (the|some|the first) (objects|things|scenes) $invideo",
    "what does the video (show|contain)",
)
REFUSE = (
    "(what|how) is the weather (in|like in) (paris|london|the city|berlin|new york|tokyo) (today|tomorrow|)",
    "who (directed|made|filmed|shot|produced|edited|recorded|wrote|owns) (it|this|the $video)",
    "who is (the|this) (person|man|woman|actor|speaker|author|director|president of france|child|driver) $maybevideo",
    "(what|which) (music|song|sound|language|voice|word) (is|can be) (playing|heard|spoken|said|used) $maybevideo",
    "what (does|do|did) the (man|woman|person|people|speaker|child|narrator|dog) (say|wear|do|eat|hold|want)",
    "(is|was) there (a|any) (music|sound|person|dog|cat|car|man|woman|house|tree|voice|speech|animal) $maybevideo",
    "how many (people|cars|dogs|cats|persons|animals|words|trees|houses) (are|do you see|can be seen) $maybevideo",
    "what is the capital of (france|germany|spain|italy|japan)",
    "how (old|tall|rich|heavy|expensive) is (the|this) (person|man|director|actor|object)",
    "where was (this|the $video|it) (filmed|made|recorded|shot)",
    "(why|for what reason) (was|is) (this|the $video) (made|so long|so short|filmed)",
    "what is (two plus two|the meaning of life|the news|the date today|your name|the time now|love|a computer)",
    "(write|tell me|give me|sing) (a|some) (poem|joke|story|song|code in python|recipe|program|letter)",
    "translate (this|that|it|hello) (to|into) (french|german|spanish|english|japanese)",
    "what (camera|device|software|format) was used to (film|make|record) (this|it|the $video)",
    "when was (this|the $video|it) (made|filmed|recorded|published)",
    "what (is|was) the (temperature|price|speed|weather|mood|message|phone number|address|brand|title) $maybevideo",
    "what happens (after|before) the video (ends|starts|begins)",
    "do you (like|love|enjoy|hate) (it|this|the $video|music|cats|people)",
    "what color is the (car|dog|cat|house|shirt|tree|sky|person|hat)",
    "(can|could) you (hear|smell|feel|taste) (it|anything|the music|something)",
)
GREETING = (
    "(hello|hi|hey|good morning|good evening|good day|greetings|howdy|good afternoon|hello there|hi there|hey there)",
    "(hello|hi|hey) (how are you|there|you|assistant|model|friend)",
    "(thanks|thank you|thank you very much|many thanks|ok thanks|great thanks|bye|goodbye|see you|cheers)",
    "(how are you|what s up|are you there|who are you|what are you|what can you do|help|help me|ok|test|start)",
)

# Form -> templates to draw from; upper-case names are blanks that `sentence` fills.
TEMPLATES: dict[str, tuple[tuple[str, ...], ...]] = {
    "code_full": (CODE,),
    "code_color": (CODE,),
    "code_place": (CODE,),
    "exist": (EXIST,),
    "order": (ORDER,),
    "count": (COUNT,),
    "time": (TIME,),
    "object": (OBJECT,),
    "object_short": (OBJECT,),
    "multi_full": (MULTI,),
    "multi_place": (MULTI,),
    "rev": (REV,),
    "atcode": (ATCODE,),
    "describe": (DESCRIBE,),
    "refuse": (REFUSE,),
    "absent": (CODE, CODE, TIME),
    "greeting": (GREETING,),
}

PREFIXES = (
    "please|please|please|hey|hi|hello|ok so|ok|so|well|now|right|quick question|question|one question|next|sorry"
    "|excuse me|just wondering|by the way|hi there|hey there|um|alright|good|great|thanks|and|also|then",
    "can you tell me|could you tell me|can you please tell me|could you please tell me|please tell me|tell me"
    "|i would like to know|i want to know|i need to know|i d like to know|do you know|would you tell me|let me know"
    "|would you mind telling me|may i ask|can i ask|i was wondering|i wonder|help me|kindly|if you can"
    "|i am curious|answer this|answer the question|answer briefly|be quick|be careful|look closely"
    "|watch carefully|based on the video|according to the video|from the video|looking at the video"
    "|using the video|here is my question|my question is|for my notes|in your opinion|as far as you can see"
    "|think about it|have a look|take a look|look at the video|watch the video|having watched the video"
    "|after watching the clip|i have a question about the video|i am watching this video|in this video"
    "|you are a helpful assistant|you are a helpful assistant answer briefly|answer with one word"
    "|answer in a few words|be concise|do not explain|you answer questions about videos",
)
SUFFIXES = (
    "please|please|please|thanks|thank you|thank you very much|thanks a lot|pls|ok|right|then|again|now|exactly"
    "|do you know|can you tell|can you tell me|tell me|if you can|if possible|briefly|in short|quickly|for me"
    "|in the video|in this clip|here|there|do you think|would you say|i wonder|just curious|my friend"
    "|answer briefly|answer with the code only|just the code|only the answer|in one word|be brief|be precise"
    "|based on the video|according to the video|from what you see|as seen in the video|from the footage"
    "|i need it for my notes|i forgot|i could not see it|it is important|take your time|let me know"
    "|keep it short|no explanation|give only the answer|answer yes or no if you can|that is all|i am not sure",
)
# Common words for noise: the model learns to look past them.
FILLERS = (
    "about across act add again air almost along already although always among another any area around ask away back"
    " bad base bear beautiful because become bed began begin behind best better big bird bit body book both boy bring"
    " build busy but buy call car care carry case catch cause certain chair change cheap city class clear close cold"
    " come common complete cook cool could country course cover cut dark day deep did different distance dog"
    " done door draw drink drive dry during each early earth easy eat else end enough even evening every example eye"
    " face fact fall family far fast father feel feet few field final find fine fire fish five floor fly follow food"
    " foot force friend front full game garden gave girl glass goes gold gone good got great ground group grow had"
    " half hand happy hard hat head hear heat heavy help her here high him his hold home horse hot hour house hundred"
    " idea inside its job keep kind king knew know lady land large last late laugh lay lead learn leave left leg less"
    " letter life light like line list little live local long lot love low machine made main make man many map matter"
    " maybe mean men might mile milk mind money month more morning mother mountain mouth move much music must"
    " name near never new news next nice night noise nose nothing noon ocean off office often old once open our own"
    " page paper part party pass pay people perhaps person piece place plan plane plant play poor pretty problem"
    " pull push put question quick quiet quite rain ran real really rest rich ride river road rock room round"
    " rule run sad said same sat save school sea seat second self sell send sense set several ship shop short should"
    " side simple since sing sister sit six size sky sleep slow small snow soft some son soon sound south space speak"
    " special stand station stay step still stone stop store story street strong study such summer sun sure table talk"
    " tall teach team tell test than their them these thin think thought through today together too took town train"
    " travel tree trip true try turn uncle upon use usual very visit voice wait walk wall want war warm wash watch"
    " water weather week well went west wheel while whole why wide wife wild wind window winter wish woman wood word"
    " work world worry would yard year yesterday young"
)
